from .accelerating import accelerate as accelerate
from .record import Acceleration as Acceleration, Pace as Pace
from .training import train as train
