"""How jaxtyping's hook checks annotations: an int may stand for a float, as type checkers have it."""

import beartype

checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
