import diffscaler_core

NAMES = """
FAMILIES METHODS
Affiner AffinerStack Attachment Control DiffScalerError Family MismatchError Schedule Target
TaskAdapter TaskBank TaskFileError UnknownNameError
__version__ attach combine_tasks export_lora find_targets import_lora load_task new_task read_info
save_task scale_task
"""


def test_the_public_names_are_exactly_these():
    assert diffscaler_core.__all__ == NAMES.split()


def test_every_public_name_is_there():
    assert all(hasattr(diffscaler_core, name) for name in diffscaler_core.__all__)


def test_every_error_is_a_value_error():
    errors = [v for k, v in vars(diffscaler_core).items() if k.endswith("Error")]
    assert len(errors) == 4
    assert all(issubclass(error, ValueError) for error in errors)
