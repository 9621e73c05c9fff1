"""Not a stage: `make ui`. MLflow's pages for the store of params.yaml, on this machine only."""

import os

from chargpt.command import user_errors


def main() -> None:
    from chargpt.config import load_params
    from chargpt.tracking import UI_ENVIRONMENT, ui_command, ui_url

    tracking = load_params().tracking
    command = ui_command(tracking)
    print(f"runs    {ui_url(tracking)}\ncurves  {ui_url(tracking, 'charts')}")
    print("ready in some seconds; Ctrl-C ends it", flush=True)
    os.execve(command[0], command, os.environ | UI_ENVIRONMENT)  # noqa: S606 -- becomes the server: one Ctrl-C ends it


if __name__ == "__main__":
    with user_errors():
        main()
