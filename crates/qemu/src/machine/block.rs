//! The machine's disk while it runs: the backing pivot, nodes, dirty bitmaps, figures.

use std::path::Path;
use std::time::{Duration, Instant};

use godwit_types::BLOCK_SIZE;
use serde_json::{Value, json};
use tracing::warn;

use super::Machine;
use super::life::Action;
use crate::disk::{DiskChain, DiskLayer, Layer, Node, file_name, layer_blockdevs, top_node};
use crate::error::QemuError;

/// What the guest has done with its disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockStats {
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Reads that failed.
    pub failed_reads: u64,
    /// Writes that failed.
    pub failed_writes: u64,
    /// Bytes at the end of the furthest write to the cow image's file.
    pub highest_write: u64,
}

/// Id of the export that tells what was written.
const WRITTEN: &str = "written";

impl Machine {
    /// Swaps everything under `top` for `layers` (bottom first) while the guest runs, and takes
    /// the nodes that nobody reads any more away. Layers that are in both chains stay as they are.
    /// Gives how long the swap itself took.
    ///
    /// # Errors
    /// A machine without a disk; a node name that stands for another file; an image that QEMU
    /// cannot open. The old chain is in place then.
    pub async fn pivot_backing(&self, layers: Vec<DiskLayer>) -> Result<Duration, QemuError> {
        let _one = self.inner.changing.lock().await;
        self.allowed(Action::Change).await?;
        let old = self.disk_chain()?;
        let new = DiskChain { layers, top: old.top.clone() };
        for l in &new.layers {
            if old.layers.iter().any(|o| o.node == l.node && o.layer != l.layer) {
                return Err(QemuError::Launch {
                    name: self.launched().name.to_string(),
                    why: format!("node '{}' already stands for another file", l.node),
                });
            }
        }
        let kept = |l: &DiskLayer| old.layers.contains(l);
        let mut added: Vec<DiskLayer> = Vec::new();
        let mut under = None;
        for l in &new.layers {
            if !kept(l)
                && let Err(e) = self.add_layer(l, under).await
            {
                self.remove_layers(&added).await;
                return Err(e);
            }
            if !kept(l) {
                added.push(l.clone());
            }
            under = Some(l.node);
        }
        let begin = Instant::now();
        let options = json!({ "options": [top_node(new.backing())] });
        if let Err(e) = self.qmp("blockdev-reopen", options).await {
            self.remove_layers(&added).await;
            return Err(e);
        }
        let took = begin.elapsed();
        let gone: Vec<DiskLayer> =
            old.layers.iter().filter(|l| !new.layers.contains(l)).cloned().collect();
        self.record(|launch| launch.disk = Some(new))?;
        self.remove_layers(&gone).await;
        Ok(took)
    }

    fn disk_chain(&self) -> Result<DiskChain, QemuError> {
        let launch = self.launched();
        launch.disk.clone().ok_or_else(|| QemuError::Launch {
            name: launch.name.to_string(),
            why: "it has no disk".into(),
        })
    }

    async fn add_layer(&self, layer: &DiskLayer, under: Option<Node>) -> Result<(), QemuError> {
        match &layer.layer {
            Layer::Nbd { socket } => self.let_connect(socket)?,
            Layer::Raw { path } | Layer::Qcow2 { path } => self.let_read(path)?,
        }
        let nodes = layer_blockdevs(std::slice::from_ref(layer), under);
        for (n, node) in nodes.iter().enumerate() {
            if let Err(e) = self.qmp("blockdev-add", node.clone()).await {
                if n > 0 {
                    self.remove_node(&file_name(layer.node)).await;
                }
                return Err(e);
            }
        }
        Ok(())
    }

    /// Takes nodes away, upper ones first.
    async fn remove_layers(&self, layers: &[DiskLayer]) {
        for l in layers.iter().rev() {
            self.remove_node(&l.node.to_string()).await;
            if !matches!(l.layer, Layer::Nbd { .. }) {
                self.remove_node(&file_name(l.node)).await;
            }
        }
    }

    async fn remove_node(&self, name: &str) {
        if let Err(e) = self.qmp("blockdev-del", json!({ "node-name": name })).await {
            warn!(node = name, error = %e, "a block node stays");
        }
    }

    /// Lets QEMU tell on the unix socket `path` (NBD, one unnamed export, read-only, with its
    /// allocation depth) what the guest has written to its overlay. Ends with
    /// [`Machine::withdraw_written`]; an earlier offer is withdrawn.
    ///
    /// # Errors
    /// A machine without a disk; a socket that cannot be made. Nothing is offered then.
    pub async fn offer_written(&self, path: &Path) -> Result<(), QemuError> {
        let _one = self.inner.changing.lock().await;
        self.disk_chain()?;
        self.end_offer().await;
        let place = self.socket_place(path)?;
        let address = json!({ "type": "unix", "data": { "path": place.qemu_path } });
        let server = json!({ "addr": address, "max-connections": 2 });
        self.qmp("nbd-server-start", server).await?;
        if let Err(e) = place.take_socket() {
            self.end_offer().await;
            return Err(e);
        }
        let export = json!({
            "id": WRITTEN, "type": "nbd", "node-name": Node::Top.to_string(), "name": "",
            "writable": false, "allocation-depth": true,
        });
        if let Err(e) = self.qmp("block-export-add", export).await {
            self.end_offer().await;
            return Err(e);
        }
        Ok(())
    }

    /// Ends what [`Machine::offer_written`] began, if it did.
    pub async fn withdraw_written(&self) {
        let _one = self.inner.changing.lock().await;
        self.end_offer().await;
    }

    async fn end_offer(&self) {
        // Ends the exports too; fails when there is no server, and then there is nothing to end.
        let _ = self.qmp("nbd-server-stop", Value::Null).await;
    }

    /// The names of the block nodes that QEMU has, sorted.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn block_nodes(&self) -> Result<Vec<String>, QemuError> {
        let nodes = self.qmp("query-named-block-nodes", json!({ "flat": true })).await?;
        let names = nodes.as_array().into_iter().flatten().filter_map(|n| n["node-name"].as_str());
        let mut names: Vec<String> = names.map(str::to_owned).collect();
        names.sort();
        Ok(names)
    }

    /// Starts to note which blocks of [`BLOCK_SIZE`] bytes the guest writes from now on.
    ///
    /// # Errors
    /// When a bitmap of that name is there already, or there is no disk.
    pub async fn bitmap_add(&self, name: &str) -> Result<(), QemuError> {
        let arguments = json!({
            "node": Node::Top.to_string(), "name": name, "granularity": BLOCK_SIZE,
            "persistent": false,
        });
        self.qmp("block-dirty-bitmap-add", arguments).await.map(drop)
    }

    /// Ends the notes of `name`.
    ///
    /// # Errors
    /// When there is no such bitmap.
    pub async fn bitmap_remove(&self, name: &str) -> Result<(), QemuError> {
        let arguments = json!({ "node": Node::Top.to_string(), "name": name });
        self.qmp("block-dirty-bitmap-remove", arguments).await.map(drop)
    }

    /// Bytes written to so far as bitmap `name` notes them, in whole blocks.
    ///
    /// # Errors
    /// When there is no such bitmap.
    pub async fn bitmap_bytes(&self, name: &str) -> Result<u64, QemuError> {
        let nodes = self.qmp("query-named-block-nodes", json!({ "flat": true })).await?;
        nodes
            .as_array()
            .into_iter()
            .flatten()
            .filter(|n| n["node-name"] == Node::Top.to_string())
            .flat_map(|n| n["dirty-bitmaps"].as_array().into_iter().flatten())
            .find(|b| b["name"] == name)
            .and_then(|b| b["count"].as_u64())
            .ok_or_else(|| QemuError::Unexpected {
                what: "the list of dirty bitmaps",
                why: format!("'{name}' is not in it"),
            })
    }

    /// What the guest has done with its disk.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn block_stats(&self) -> Result<BlockStats, QemuError> {
        let answer = self.qmp("query-blockstats", Value::Null).await?;
        let disk = answer
            .as_array()
            .into_iter()
            .flatten()
            .find(|d| d["node-name"] == Node::Top.to_string())
            .cloned()
            .unwrap_or_default();
        let stat = |key: &str| disk["stats"][key].as_u64().unwrap_or(0);
        Ok(BlockStats {
            read_bytes: stat("rd_bytes"),
            written_bytes: stat("wr_bytes"),
            failed_reads: stat("failed_rd_operations"),
            failed_writes: stat("failed_wr_operations"),
            highest_write: stat("wr_highest_offset"),
        })
    }
}
