"""Visual-token reduction: one algebra of small pieces, of which every method is a composition.

A *stage* stands at a site (`encoder.layers`, `encoder`, `projector`, `decoder`) and takes N visual
tokens to k < N by one of three verbs: it *selects* tokens by scores, *merges* those that are alike,
or *transforms* the grid by a constant matrix. A stage is plain data; the number of tokens behind it
is known before any weight is read.

Every piece is its options (a frozen pydantic model), a torch function that is exported as it runs,
and a numpy twin that follows the definition, against which tests hold it.
"""
