//! The block graph of a machine's disk, by fixed node names.
//!
//! ```text
//! guest -> top (qcow2, the only writable node) -> ... layers, top to bottom ... -> base
//! ```
//!
//! Every backing link is given by node name, so that no path inside a qcow2 header is followed.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// What a read-only node reads from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// A raw image file.
    Raw {
        /// Its path.
        path: PathBuf,
    },
    /// A qcow2 file.
    Qcow2 {
        /// Its path.
        path: PathBuf,
    },
    /// The whole disk as an NBD server on a unix socket shows it, default export.
    Nbd {
        /// Path of the socket.
        socket: PathBuf,
    },
}

/// A fixed node name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Node {
    /// The base image.
    Base,
    /// A docked layer, counted from the base.
    Layer(u8),
    /// The source of a migration, over NBD.
    Remote,
    /// The immutable middle layer that a migration filled.
    Mid,
    /// The cow image that the guest writes to.
    Top,
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Base => f.write_str("base"),
            Self::Layer(n) => write!(f, "layer{n}"),
            Self::Remote => f.write_str("remote"),
            Self::Mid => f.write_str("mid"),
            Self::Top => f.write_str("top"),
        }
    }
}

/// One read-only node of a chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskLayer {
    /// Its node name.
    pub node: Node,
    /// What it reads from.
    pub layer: Layer,
}

/// A chain of read-only layers, bottom first, and the writable image on top of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskChain {
    /// The layers, bottom first.
    pub layers: Vec<DiskLayer>,
    /// The qcow2 file the guest writes to.
    pub top: PathBuf,
}

impl DiskChain {
    /// The chain of `layers`, bottom first, under `top`. The lowest file is `base`, an NBD layer
    /// is `remote`, the files between are `layer0` and up.
    #[must_use]
    pub fn over(layers: Vec<Layer>, top: impl Into<PathBuf>) -> Self {
        let mut files = 0u8;
        let layers = layers
            .into_iter()
            .map(|layer| {
                let node = match (&layer, files) {
                    (Layer::Nbd { .. }, _) => Node::Remote,
                    (_, 0) => Node::Base,
                    (_, n) => Node::Layer(n - 1),
                };
                if node != Node::Remote {
                    files = files.saturating_add(1);
                }
                DiskLayer { node, layer }
            })
            .collect();
        Self { layers, top: top.into() }
    }

    /// The node right under `top`.
    #[must_use]
    pub fn backing(&self) -> Option<Node> {
        self.layers.last().map(|l| l.node)
    }

    /// The `blockdev` descriptions, in an order in which each refers only to earlier ones.
    pub(crate) fn blockdevs(&self) -> Vec<Value> {
        let mut all = layer_blockdevs(&self.layers, None);
        all.push(file_node(Node::Top, &self.top, false));
        all.push(self.top_node());
        all
    }

    /// The description of `top`, as `blockdev-add` and `blockdev-reopen` take it.
    pub(crate) fn top_node(&self) -> Value {
        top_node(self.backing())
    }
}

/// The description of `top` over `backing`.
pub(crate) fn top_node(backing: Option<Node>) -> Value {
    json!({
        "driver": "qcow2",
        "node-name": Node::Top.to_string(),
        "read-only": false,
        "discard": "unmap",
        "file": file_name(Node::Top),
        "backing": backing.map(|n| n.to_string()),
    })
}

/// Descriptions of `layers`, bottom first, the lowest over `under`.
pub(crate) fn layer_blockdevs(layers: &[DiskLayer], under: Option<Node>) -> Vec<Value> {
    let mut all = Vec::new();
    let mut below = under;
    for l in layers {
        match &l.layer {
            Layer::Raw { path } => {
                all.push(file_node(l.node, path, true));
                all.push(json!({
                    "driver": "raw", "node-name": l.node.to_string(), "read-only": true,
                    "file": file_name(l.node),
                }));
            }
            Layer::Qcow2 { path } => {
                all.push(file_node(l.node, path, true));
                all.push(json!({
                    "driver": "qcow2", "node-name": l.node.to_string(), "read-only": true,
                    "file": file_name(l.node),
                    "backing": below.map(|n| n.to_string()),
                }));
            }
            Layer::Nbd { socket } => all.push(json!({
                "driver": "nbd", "node-name": l.node.to_string(), "read-only": true,
                "server": {"type": "unix", "path": socket.to_string_lossy()},
                "reconnect-delay": NBD_RECONNECT_S,
                "open-timeout": NBD_OPEN_TIMEOUT_S,
            })),
        }
        below = Some(l.node);
    }
    all
}

/// Seconds a read waits for a lost NBD server to come back before the guest sees an error.
const NBD_RECONNECT_S: u32 = 24 * 3600;
/// Seconds to keep trying to reach the NBD server at first.
const NBD_OPEN_TIMEOUT_S: u32 = 10;

/// The name of the file node under `node`.
pub(crate) fn file_name(node: Node) -> String {
    format!("{node}-file")
}

fn file_node(node: Node, path: &Path, read_only: bool) -> Value {
    json!({
        "driver": "file", "node-name": file_name(node), "filename": path.to_string_lossy(),
        "read-only": read_only, "discard": "unmap", "auto-read-only": false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_get_their_fixed_names_and_refer_downwards() {
        let chain = DiskChain::over(
            vec![
                Layer::Raw { path: "/b".into() },
                Layer::Qcow2 { path: "/l0".into() },
                Layer::Qcow2 { path: "/l1".into() },
            ],
            "/t",
        );
        let names: Vec<_> = chain.layers.iter().map(|l| l.node.to_string()).collect();
        assert_eq!(names, ["base", "layer0", "layer1"]);
        let nodes = chain.blockdevs();
        let mut seen = Vec::new();
        for n in &nodes {
            for key in ["file", "backing"] {
                if let Some(below) = n[key].as_str() {
                    assert!(seen.contains(&below.to_owned()), "{below} before {n}");
                }
            }
            seen.push(n["node-name"].as_str().expect("named").to_owned());
        }
        assert_eq!(nodes.last().expect("top")["backing"], "layer1");
    }

    #[test]
    fn a_chain_over_the_source_reads_through_remote_alone() {
        let chain = DiskChain::over(vec![Layer::Nbd { socket: "/s".into() }], "/t");
        assert_eq!(chain.backing(), Some(Node::Remote));
        assert_eq!(chain.blockdevs().len(), 3);
    }

    #[test]
    fn the_lowest_qcow2_has_no_backing_whatever_its_header_says() {
        let chain = DiskChain::over(vec![Layer::Qcow2 { path: "/b".into() }], "/t");
        let base = &chain.blockdevs()[1];
        assert_eq!(base["backing"], Value::Null);
        assert!(base.as_object().expect("object").contains_key("backing"));
    }
}
