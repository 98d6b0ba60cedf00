"""The page report.html of a run: drawn from what training has logged, during the run or later.

`events` and `logs` read TensorBoard's event files and Megatron's log lines into a `history`; `figures` draws its plots,
`facts` collects its settings, and `page` writes the page. `follow` is the program that keeps the page of a running
training up to date. Nothing here imports torch.
"""
