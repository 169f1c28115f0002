//! Image files: what may be used, how they are made, read and written.
//!
//! ```text
//! base (raw, immutable) <- layer0 .. layerN (qcow2, immutable) <- top (qcow2, QEMU's own)
//! ```

mod chain;
mod header;
mod layer;
mod mid;
mod tool;

pub use chain::FrozenChain;
pub use header::{HEADER_BYTES, MAX_DISK_BYTES, Qcow2Error, Qcow2Header};
pub use layer::{LayerMap, duplicate, flatten, materialise};
pub use mid::{MidLayer, Resumed};
pub use tool::{
    Backing, CLUSTER_BYTES, check_base, create_overlay, inspect, qemu_img_repair, virtual_bytes,
};
