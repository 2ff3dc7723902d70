"""How a model knows positions: the table of all methods, their settings, and the rarer formulas."""
from methods.angles import build_clex, depends_on_length, inv_freq
from methods.config import RopeConfig, parse_rope_flag
from methods.position_inputs import (PositionInputs, inputs_of_layers, position_ids,
                                     position_inputs, text_positions)
from methods.table import ALIASES, METHODS, Method, Setting
from methods.training_positions import training_positions

__all__ = ["ALIASES", "METHODS", "Method", "PositionInputs", "RopeConfig", "Setting", "build_clex",
           "depends_on_length", "inputs_of_layers", "inv_freq", "parse_rope_flag", "position_ids",
           "position_inputs", "text_positions", "training_positions"]
