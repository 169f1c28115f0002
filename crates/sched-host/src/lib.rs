//! Co-scheduling of sibling vCPUs from user space.
pub mod cgroup;
pub mod cli;
pub mod cpus;
pub mod discover;
pub mod observe;
pub mod proc;
pub mod queues;
pub mod sys;
