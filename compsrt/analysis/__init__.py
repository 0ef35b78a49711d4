"""Statistics of tensors and of results, behind `python -m compsrt.statistics`.

Imports run downward in this list:

    commands    the subcommands
    figures     a page of plots for each of them (matplotlib, the extra `demo`)
    tables      what they print
    results     one method against another from metrics per picture
    errors      quantization error by transform, and which measure predicts it
    measures    normality, range and band of a tensor before and after, and their tests
    dumps       tensors from files: this package's dump, and the published layout
    tensors     what a quantizer sees: sampled operands of a model, before and after a transform
    paired      paired tests, effect sizes, Holm's correction, intervals, rank correlations
"""
