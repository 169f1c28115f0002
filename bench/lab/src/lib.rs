//! Small machines to measure schedulers in.
//!
//! Each is booted straight from a Debian kernel with sched_ext and an initramfs made on the spot:
//! no disk, no network, nothing left behind. They are measuring equipment outside the product, so
//! they start QEMU themselves and have nothing of what a machine of Godwit has (no manifest, no
//! QMP, no state to dock).
//!
//! - [`Kernel`]: the newest kernel of Debian's backports, fetched once;
//! - [`Initramfs`]: programs of the host with the libraries they need, as a `newc` archive;
//! - [`Machine`]: one running guest; commands go in and their output comes back.
//!
//! ```no_run
//! use godwit_lab::{Initramfs, Kernel, Machine, Spec};
//! use std::time::Duration;
//!
//! let kernel = Kernel::find()?;
//! let initramfs = Initramfs::new().program("/usr/bin/taskset")?;
//! let mut machine = Machine::boot(&kernel, &initramfs, &Spec::new("probe", 4, 512))?;
//! let answer = machine.run("cat /sys/kernel/sched_ext/state", Duration::from_secs(10))?;
//! assert_eq!(answer.output, "disabled\n");
//! # Ok::<(), godwit_lab::Error>(())
//! ```

mod error;
mod initramfs;
mod kernel;
mod machine;

pub use error::Error;
pub use initramfs::Initramfs;
pub use kernel::Kernel;
pub use machine::{Answer, Clock, Machine, Spec};
