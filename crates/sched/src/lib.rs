//! Co-scheduling of sibling vCPUs.
//!
//! The algorithm is chapter 4 of K. Wang's dissertation, *self-boosted co-scheduling* (SBCO): the
//! vCPUs of a machine are kept on distinct pCPUs, and when one of them is about to run while a
//! sibling stands far back in its own run queue, the fast one lends virtual runtime to the slow
//! one, so that both come close.
//!
//! - [`tree`]: the red-black tree with the RB index, which makes ordinates O(log n);
//! - [`policy`]: SBCO and its rivals as points of one space; the constants of CFS;
//! - [`scheduler`]: run queues after Linux 2.6.34, on which all of them stand;
//! - [`placement`]: where a task runs;
//! - [`sbco`]: Algorithms 1 and 2, loans and their ledger;
//! - [`adaptive`]: alpha after what a machine's distance costs it;
//! - [`eevdf`], [`rivals`]: what it is compared with;
//! - [`sim`]: a simulator of hosts and their machines.

pub mod adaptive;
mod audit;
pub mod eevdf;
pub mod placement;
pub mod policy;
pub mod rivals;
pub mod sbco;
pub mod scheduler;
pub mod sim;
pub mod tree;
