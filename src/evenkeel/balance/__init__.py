"""Balance: a network moved, within its function, to the point of the least norm."""

from evenkeel.balance.balance import Balance as Balance
from evenkeel.balance.balance import balance_ as balance_
from evenkeel.balance.balancer import Balancer as Balancer
