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
//!
//! # How it works
//!
//! The run queues are red-black trees that carry the thesis' RB index, so a scheduling ordinate
//! costs O(log n). A policy is where siblings may be placed and what couples them: nothing
//! (2.6.34's CFS and EEVDF), Algorithm 1 with a fixed or an adaptive alpha, the two kinds of forced
//! co-scheduling, strict and relaxed co-scheduling, KVM's directed yield with and without its
//! credit. All share one interface and one set of property tests. A loan moves each of two siblings
//! by what it needs to have its turn when the other has; the difference stands in an account of
//! their machine, which its vCPUs pay off in instalments, so lending is zero-sum and paying moves
//! no sibling away from the others. More than two siblings follow one of them, since in pairs they
//! do not settle. Gangs claim pCPUs one by one, so those of machines that are smaller than the host
//! run side by side. The adaptive alpha starts at the thesis' 2/3 and goes down towards 0 for a
//! machine whose vCPUs are seen to spin for siblings that stand far back; a step that brought
//! nothing is taken back and tried ever more rarely, and each change carries its reason. The core
//! is sans-IO: it is told what ran and says who runs. The simulator's workloads say where each
//! parameter is from, and which are guesses; none was fitted to a result. A run can be recorded and
//! drawn (`godwit-bench timeline`).

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
