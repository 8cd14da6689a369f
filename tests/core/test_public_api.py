import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffscaler_core

NAMES = """
FAMILIES METHODS
Affiner AffinerStack Attachment Control DiffScalerError Family MismatchError Schedule Target
TaskAdapter TaskBank TaskFileError UnknownNameError
__version__ attach combine_tasks export_lora find_targets import_lora load_task new_task read_info
save_task scale_task
"""


def fresh(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_public_names_are_exactly_these():
    assert diffscaler_core.__all__ == NAMES.split()
    assert set(dir(diffscaler_core)) >= set(NAMES.split())


def test_every_public_name_is_there():
    assert all(hasattr(diffscaler_core, name) for name in diffscaler_core.__all__)


def test_another_name_is_not():
    with pytest.raises(AttributeError, match="'diffscaler_core' has no attribute 'detach'"):
        _ = diffscaler_core.detach


def test_type_checkers_see_what_is_imported_on_use():
    tree = ast.parse(Path(diffscaler_core.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {node.module: tuple(alias.name for alias in node.names) for node in block.body}
    assert seen == diffscaler_core._NAMES


def test_every_error_is_a_value_error():
    errors = [v for k, v in vars(diffscaler_core).items() if k.endswith("Error")]
    assert len(errors) == 4
    assert all(issubclass(error, ValueError) for error in errors)


@pytest.mark.parametrize(
    "before", ["", "import diffscaler_core.attach", "from diffscaler_core.attach import Attachment"]
)
def test_attach_is_the_function_whatever_was_imported_before(before):
    code = (
        f"{before}\nfrom diffscaler_core import attach\nimport sys; sys.stdout.write(repr(attach))"
    )
    assert fresh(code).startswith("<function attach at")


def test_importing_the_package_does_not_import_torch():
    assert fresh("import diffscaler_core, sys; sys.stdout.write(str('torch' in sys.modules))") == (
        "False"
    )
