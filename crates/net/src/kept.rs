//! The rules of a site's namespaces as they were right: with them a look finds them unchanged, also
//! that of the next daemon, without having them listed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::command::{NetError, run};
use crate::look::{Look, within};
use crate::netlink::rules_generation;

/// Where what is known of a network is, as long as its host is up.
pub(crate) const RUN: &str = "/run/godwit-net";
const FILE: &str = "rules.json";

/// Rules that were right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    /// The namespace.
    namespace: u64,
    /// How often its rules had been changed then; none where the kernel does not say.
    generation: Option<u32>,
    /// What they were made of: other machines make other rules.
    text: String,
    /// How the kernel listed them.
    listed: String,
}

/// The rules of all namespaces of a site, by the name of what is kept of each.
#[derive(Debug, Default)]
pub(crate) struct KeptRules(BTreeMap<String, Kept>);

/// Whose rules they are, and how they are set and listed.
pub(crate) struct Table<'a> {
    /// The namespace; none for the host.
    pub(crate) namespace: Option<&'a str>,
    /// The name of what is kept.
    pub(crate) name: &'a str,
    /// The arguments of `nft` that list them.
    pub(crate) list: &'a [&'a str],
}

impl Table<'_> {
    async fn nft(&self, args: &[&str], input: &str) -> Result<String, NetError> {
        let enter: Vec<&str> =
            self.namespace.iter().flat_map(|n| ["ip", "netns", "exec", n]).collect();
        run(&[&enter[..], &["nft"], args].concat(), input).await
    }

    fn file(&self) -> PathBuf {
        Path::new(RUN).join(self.name).join(FILE)
    }

    async fn generation(&self) -> Option<u32> {
        within(self.namespace, rules_generation).await.ok()
    }
}

impl KeptRules {
    /// Has a table be what `text` says, unless it is; whether anything had changed there.
    pub(crate) async fn set(
        &mut self,
        table: &Table<'_>,
        look: &Look,
        text: &str,
    ) -> Result<bool, NetError> {
        let is_ours = |k: &Kept| k.namespace == look.namespace;
        if !self.0.contains_key(table.name)
            && let Some(before) = load(&table.file())
        {
            self.0.insert(table.name.to_owned(), before);
        }
        let before = self.0.get(table.name).filter(|k| is_ours(k) && k.text == text).cloned();
        if let Some(before) = before {
            if before.generation.is_some() && before.generation == look.rules {
                return Ok(false);
            }
            // Others have tables of their own.
            let generation = table.generation().await;
            let now = table.nft(table.list, "").await.unwrap_or_default();
            if now == before.listed {
                self.keep(table, Kept { generation, ..before })?;
                return Ok(true);
            }
            warn!(
                table = table.name,
                "somebody else changed a network's rules: they are put right"
            );
        }
        table.nft(&["-f", "-"], text).await?;
        let generation = table.generation().await;
        let listed = table.nft(table.list, "").await?;
        let (namespace, text) = (look.namespace, text.to_owned());
        self.keep(table, Kept { namespace, generation, text, listed })?;
        Ok(true)
    }

    fn keep(&mut self, table: &Table<'_>, kept: Kept) -> Result<(), NetError> {
        let file = table.file();
        let dir = file.parent().unwrap_or(Path::new(RUN));
        std::fs::create_dir_all(dir).map_err(NetError::io("making", dir))?;
        let new = file.with_extension("new");
        let text = serde_json::to_vec(&kept).unwrap_or_default();
        std::fs::write(&new, text).map_err(NetError::io("writing", &new))?;
        std::fs::rename(&new, &file).map_err(NetError::io("writing", &file))?;
        self.0.insert(table.name.to_owned(), kept);
        Ok(())
    }

    /// Whether anything is known of them.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Nothing is known of them any more.
    pub(crate) fn forget(&mut self, name: &str) {
        self.0.remove(name);
        let dir = Path::new(RUN).join(name);
        let _ = std::fs::remove_file(dir.join(FILE));
        // One in which there is something else stays.
        let _ = std::fs::remove_dir(dir);
    }
}

/// What an earlier daemon has kept; what cannot be read is nothing.
fn load(file: &Path) -> Option<Kept> {
    serde_json::from_slice(&std::fs::read(file).ok()?).ok()
}
