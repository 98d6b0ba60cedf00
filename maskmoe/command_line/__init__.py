"""The subcommands of `maskmoe`.

`registry` lists the subcommands, `main` runs the one that the command line names, and each other module has a function
`main` that reads `sys.argv`. `tools/*.py` call the same functions from a checkout.
"""
