"""The inputs of the node that picks a task."""

from comfy_api.latest import io

from .inputs import task_list_input
from .task_picking import IF_NONE


def pick_inputs() -> list[io.Input]:
    """Returns the node's inputs."""
    return [
        io.Model.Input("model", tooltip="The diffusion model the tasks were made for."),
        io.Vae.Input("vae", tooltip="The model's VAE."),
        io.Image.Input(
            "image",
            tooltip="The picture, at a size the model draws at. Several pictures are "
            "judged together: which task fits them all.",
        ),
        task_list_input("A candidate; connect one and a slot for the next appears."),
        io.Int.Input(
            "probes",
            default=16,
            min=2,
            max=1024,
            tooltip="How often noise is put on the picture and removed, for the tasks that "
            "stay to the end. More tell more alike tasks apart.",
        ),
        io.Float.Input(
            "threshold",
            default=3.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="A task fits if it beats the model alone by more than this many "
            "standard errors. Higher: 'none of them' more often.",
        ),
        io.Combo.Input(
            "if_none",
            options=list(IF_NONE),
            default=IF_NONE[0],
            tooltip="What comes out when none fits. 'no task': one that changes nothing; "
            "'closest': the best one all the same; 'stop': an error that stops the workflow.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            tooltip="Seed of the noise. The same seed gives the same answer.",
        ),
        io.Conditioning.Input(
            "conditioning",
            optional=True,
            tooltip="What the model is told meanwhile; an empty prompt is best. Left "
            "open: the empty prompt that one of the tasks stores.",
        ),
        io.Float.Input(
            "least",
            default=0.0,
            min=0.0,
            max=0.99,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="A task must also lower the model's error by this share, 0.1: a tenth. "
            "0: any share will do.",
        ),
        io.Boolean.Input(
            "halving",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Drop the worse half of the tasks after a few probes, and again with "
            "twice as many. Off: all tasks get all probes.",
        ),
        io.Int.Input(
            "batch_size",
            default=16,
            min=1,
            max=4096,
            optional=True,
            advanced=True,
            tooltip="The most pictures in one call of the model. Smaller takes less "
            "memory; the answer stays the same.",
        ),
    ]
