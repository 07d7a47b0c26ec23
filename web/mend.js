// Mends the widget values of saved workflows before ComfyUI puts them on the canvas.
//
// A file holds the values of a node by position. Files of other versions have some that a widget cannot have, such as a
// word where a number belongs. Each of those becomes the widget's default, and a message says which. Names of files
// stay as they are, so that ComfyUI says itself which one is missing.
import { app } from "../../scripts/app.js"

const PACK = "Raylight"
const CONTROLS = ["fixed", "increment", "decrement", "randomize"]
const WIDGETS = ["INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"]

function widgetsOf(definition) {
  const widgets = []
  for (const part of ["required", "optional"]) {
    const inputs = definition.input?.[part] ?? {}
    for (const name of definition.input_order?.[part] ?? Object.keys(inputs)) {
      const [kind, options = {}] = inputs[name]
      const choices = Array.isArray(kind) ? kind : options.options
      if ((!Array.isArray(kind) && !WIDGETS.includes(kind)) || options.forceInput) continue
      widgets.push({ name, kind: Array.isArray(kind) ? "COMBO" : kind, choices, options })
      if (options.control_after_generate)
        widgets.push({ name: `control after ${name}`, kind: "COMBO", choices: CONTROLS, options: {} })
    }
  }
  return widgets
}

function fallback({ kind, choices, options }) {
  if (options.default !== undefined) return options.default
  return { INT: options.min ?? 0, FLOAT: options.min ?? 0, STRING: "", BOOLEAN: false, COMBO: choices?.[0] }[kind]
}

function mended(value, widget) {
  const { kind, choices, options } = widget
  switch (kind) {
    case "INT":
    case "FLOAT": {
      const number = typeof value === "boolean" ? Number(value) : value
      const fits = typeof number === "number" && number >= (options.min ?? -Infinity) && number <= (options.max ?? Infinity)
      return fits ? number : fallback(widget)
    }
    case "BOOLEAN":
      return typeof value === "boolean" ? value : fallback(widget)
    case "STRING":
      return typeof value === "string" ? value : fallback(widget)
    default: {
      const isFile = typeof value === "string" && /\.\w+$/.test(value)
      return isFile || !choices || choices.includes(value) ? value : fallback(widget)
    }
  }
}

export function mendNode(node, definition) {
  if (!Array.isArray(node.widgets_values)) return []
  const changes = []
  widgetsOf(definition).forEach((widget, position) => {
    if (position >= node.widgets_values.length) return
    const value = node.widgets_values[position]
    const better = mended(value, widget)
    if (better === value) return
    node.widgets_values[position] = better
    changes.push(`${definition.display_name} (${node.id}): ${widget.name} ${JSON.stringify(value)} is now ${better}`)
  })
  return changes
}

function definitionOf(type) {
  const definition = globalThis.LiteGraph?.registered_node_types?.[type]?.nodeData
  return definition?.category?.startsWith(PACK) ? definition : undefined
}

app.registerExtension({
  name: "Raylight.mend",
  beforeConfigureGraph(graph) {
    const nodes = [graph, ...(graph.definitions?.subgraphs ?? [])].flatMap((part) => part.nodes ?? [])
    const changes = nodes.flatMap((node) => {
      const definition = definitionOf(node.type)
      return definition ? mendNode(node, definition) : []
    })
    if (!changes.length) return
    console.info(`Raylight: values that this version does not have:\n${changes.join("\n")}`)
    app.extensionManager?.toast?.add({
      severity: "info",
      summary: "Raylight: old values replaced by defaults",
      detail: changes.join("\n"),
      life: 12000,
    })
  },
})
