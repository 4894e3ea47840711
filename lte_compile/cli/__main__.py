"""`python -m lte_compile.cli`, which is how launchers of several processes start the command line."""

from lte_compile.cli.app import main

main()
