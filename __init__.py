"""ComfyUI's entry to the node pack. Scripts import `diffscaler_core` instead."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Returns the extension that lists the pack's nodes.

    The import stands inside because pytest imports this file too, as a module without a parent
    package.
    """
    from .nodes import DiffScalerExtension

    return DiffScalerExtension()
