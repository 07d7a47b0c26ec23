// Shows the text of Ray Report below its chart.
import { app } from "../../scripts/app.js"
import { ComfyWidgets } from "../../scripts/widgets.js"

app.registerExtension({
  name: "Raylight.report",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "RayReport") return
    const onExecuted = nodeType.prototype.onExecuted
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments)
      let widget = this.widgets?.find(({ name }) => name === "text")
      if (!widget) {
        widget = ComfyWidgets.STRING(this, "text", ["STRING", { multiline: true }], app).widget
        widget.options.serialize = widget.serialize = false
        if (widget.inputEl) widget.inputEl.readOnly = true
        this.setSize([Math.max(this.size[0], 460), Math.max(this.size[1], 640)])
      }
      widget.value = message.text.join("\n")
    }
  },
})
