from pathlib import Path

from causalmix_pipeline import tables
from causalmix_pipeline_tests.test_layers import imports_of

PACKAGE = Path(tables.__file__).parent


def test_only_commands_import_the_face_so_that_it_may_import_everything():
    users = {
        path.stem
        for path in PACKAGE.rglob("*.py")
        for name, _ in imports_of(path)
        if name == "causalmix_pipeline.tables"
    }

    assert users <= {"cli_tables", "cli_top_ups"}


def test_the_face_documents_all_it_offers():
    functions = [getattr(tables, name) for name in tables.__all__ if name != "TableSource"]

    assert all(function.__doc__ for function in functions)
