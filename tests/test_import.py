"""Importing the package loads torch and nothing heavy."""

import os
import subprocess
import sys

HEAVY = ("pandas", "scipy", "plotly", "transformers", "pyarrow", "ray", "lightning", "typer", "rich", "jinja2")


def run(code):
    environment = os.environ | {"PYTHONPATH": ""}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return answer.stdout.strip()


def test_importing_fullrank_loads_no_heavy_library():
    code = f"import fullrank, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert run(code) == "[]"


def test_importing_fullrank_itself_loads_no_module_that_torch_does_not():
    code = (
        "import torch, sys; before = set(sys.modules); import fullrank; "
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before} - {'fullrank'}))"
    )
    assert len(eval(run(code))) <= 5


def test_every_public_name_loads():
    code = "import fullrank; print([type(getattr(fullrank, name)).__name__ for name in fullrank.__all__])"
    assert "examine" in dir(__import__("fullrank"))
    assert run(code)


def test_an_unknown_name_is_an_attribute_error():
    assert run("import fullrank; print(hasattr(fullrank, 'nonsense'))") == "False"
