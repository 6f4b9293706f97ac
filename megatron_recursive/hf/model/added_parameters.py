"""What recursion adds, as the package has it. In an export ``plan/added_parameters.py`` stands in this file's place."""

from megatron_recursive.plan.added_parameters import EVERY, AddedParameter, added_parameters, start_of

__all__ = ["EVERY", "AddedParameter", "added_parameters", "start_of"]
