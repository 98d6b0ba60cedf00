"""The subcommands of `maskmoe`.

`main` lists the subcommands and runs the one that the command line names. `parser` reads all command lines, and
`ranges` has the ranges of their numbers. Each other module but `run_tool` is a subcommand, with a function `main` that
reads `sys.argv`; `tools/*.py` call these functions from a checkout.
"""
