"""The subcommands of `maskmoe`.

`main` lists the subcommands and runs the one that the command line names. Each other module is a subcommand, with a
function `main` that reads `sys.argv`.
"""
