"""UNets and VAEs by rows of the latent, with the halo that their convolutions need. Runs in a worker."""
