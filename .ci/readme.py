"""Take the README at its word: print one of its commands, or run its Python blocks.

python .ci/readme.py command tests   prints the bash block whose introduction mentions "tests"
python .ci/readme.py blocks          runs the python blocks in order, in one namespace
"""

import os
import re
import sys
import tempfile
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[tuple[str, str]]:
    """The paragraph before each block of ``language``, and the block."""
    return re.findall(rf"([^\n]*)\n+```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def command(name: str) -> str:
    """The bash block introduced by a line that mentions ``name``."""
    [block] = [block for before, block in blocks("bash") if name in before]
    return block.strip()


def run_blocks() -> None:
    """Run the python blocks as a reader would, one after the other."""
    namespace: dict[str, object] = {"__name__": "readme"}
    code = [block for _, block in blocks("python")]
    assert code, "the README has no python block"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for number, block in enumerate(code, 1):
            print(f"README block {number} of {len(code)}", flush=True)
            exec(compile(block, f"README block {number}", "exec"), namespace)
    print(f"{len(code)} passed, 0 failed")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["command", name]:
            print(command(name))
        case ["blocks"]:
            run_blocks()
        case _:
            sys.exit(__doc__)
