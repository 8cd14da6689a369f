"""Runs tasks as experts: a router says which task each latent runs, at each step."""

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..diffscaler_core.systems.posterior import MODES
from ..diffscaler_core.systems.router import load_router
from .edge_types import CATEGORY
from .expert_routing import route_experts
from .folders import stamp_of
from .inputs import chosen_component, component_input, strength_input, task_list_input
from .router_files import router_files, router_path


class DiffScalerRouteExperts(io.ComfyNode):
    """Experts and their router on a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerRouteExperts",
            display_name="Route DiffScaler Experts",
            category=CATEGORY,
            description="Runs tasks that were trained on parts of one data set as one model: at "
            "each step a small router looks at each latent and says which task it is for. Latents "
            "with different tasks share one call of the model, with guidance as usual.",
            search_aliases=[
                *("diffscaler", "experts", "router", "mixture of experts", "moe"),
                *("decentralized diffusion", "ddm"),
            ],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model the tasks were made for."),
                io.Combo.Input(
                    "router_name",
                    options=router_files(),
                    tooltip="A file in models/diffscaler_routers or output/diffscaler_routers, "
                    "written by 'diffscaler train-router'.",
                ),
                task_list_input("An expert, called as the router's file calls it; in any order."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="top1",
                    tooltip="'top1': each latent runs its likeliest expert, one call of the model "
                    "a step. 'top2', 'nucleus' (those that hold 90 %) and 'full' mix the "
                    "predictions of several, and call the model once for each.",
                ),
                strength_input("Of all experts: 1 is as trained, 0 the model itself."),
                component_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with experts and router.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, router_name: str, **inputs: object) -> object:
        """Returns what changes when the file does, so that an overwritten file is loaded again."""
        try:
            path = router_path(router_name)
            return path, stamp_of(path)
        except OSError:
            return router_name

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        router_name: str,
        tasks: io.Autogrow.Type,
        mode: str = "top1",
        strength: float = 1.0,
        component: str = "auto",
    ) -> io.NodeOutput:
        """Runs the node."""
        router = load_router(router_path(router_name))
        connected = [task for task in tasks.values() if task is not None]
        chosen = chosen_component(component)
        return io.NodeOutput(route_experts(model, connected, router, mode, strength, chosen))
