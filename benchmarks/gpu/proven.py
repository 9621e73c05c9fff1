"""Write chargpt/kernels/proven.json: the kinds of GPU for which benchmarks/results holds a pass of every check.

Run as `python -m benchmarks.gpu.proven` after results were added. `make gpu` does it at its end.
"""

import json

from benchmarks.harness import RESULTS
from chargpt.files import replaced_file
from chargpt.kernels import proven


def main() -> None:
    found = proven.record(RESULTS)
    with replaced_file(proven.FILE) as file:
        file.write((json.dumps(found, indent=1) + "\n").encode())
    for implementation, kinds in found.items():
        told = ", ".join(f"{capability} ({entry['device']})" for capability, entry in kinds.items())
        print(f"{implementation}: auto takes it on compute capability {told}" if told else f"{implementation}: nowhere")


if __name__ == "__main__":
    main()
