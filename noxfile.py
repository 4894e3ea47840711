"""The suite at both ends of the supported versions: `nox`, or `nox -s "tests(old)" -- tests/passes` for a part.

Every session has an environment of its own; PyTorch's Linux wheels there are the CUDA builds, some 5 GB each.
docs/versions.md says what the last run saw. `nox -s zoo` runs the long tests of the newest end, as a nightly job would.
"""

import nox

# Triton 3.6's interpreter, which the kernel tests use where there is no GPU, turns arrays of one element into numbers;
# NumPy 2.4 no longer does.
ENDS = {
    "old": ("torch==2.11.0", "transformers==5.17.0", "triton==3.6.0", "numpy<2.4"),
    "new": ("torch==2.14.1", "transformers==5.23.0"),
}

nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
@nox.parametrize("end", list(ENDS), ids=list(ENDS))
def tests(session: nox.Session, end: str) -> None:
    """The default suite, or what is given after `--`."""
    _run(session, end, session.posargs)


@nox.session
def zoo(session: nox.Session) -> None:
    """The tests that take minutes, at the new end."""
    _run(session, "new", ["-m", "zoo or (slow and not gpu and not browser)", *session.posargs])


def _run(session: nox.Session, end: str, arguments: list[str]) -> None:
    session.install("--editable", ".[dev]", *ENDS[end])
    session.run("python", "-c", "import torch, transformers; print(torch.__version__, transformers.__version__)")
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "loadfile", *arguments, env={"OMP_NUM_THREADS": "1"})
