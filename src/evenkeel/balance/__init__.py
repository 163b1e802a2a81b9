"""Balance: a network moved, within its function, to the point of the least norm."""

from evenkeel.balance.arrays import ArrayBalance as ArrayBalance
from evenkeel.balance.arrays import balance_arrays_ as balance_arrays_
from evenkeel.balance.balance import Balance as Balance
from evenkeel.balance.balance import balance_ as balance_
from evenkeel.balance.balancer import Balancer as Balancer
from evenkeel.balance.rescaled import Rescaled as Rescaled
