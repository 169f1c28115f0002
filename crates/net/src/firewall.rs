//! Whether the host's own firewall drops what networks of kind `nat` forward: a chain of somebody else's
//! (Docker's, say) with policy drop counts, whatever ours accept.

use serde_json::Value;

use crate::command::{NetError, run};
use crate::names::VETHS;

/// How many tables are looked into.
const MOST: usize = 32;

/// A chain on the way of what is forwarded that drops what none of its rules accepts.
#[derive(Debug, PartialEq, Eq)]
struct Drops {
    family: String,
    table: String,
    chain: String,
}

/// What on this host, or in one of its network namespaces, keeps machines in networks of kind `nat`
/// from the world, in words that say what lets them through.
///
/// # Errors
/// When the rules cannot be listed.
pub async fn forward_drops(namespace: Option<&str>) -> Result<Vec<String>, NetError> {
    let enter: Vec<&str> = namespace.iter().flat_map(|n| ["ip", "netns", "exec", n]).collect();
    let nft = [&enter[..], &["nft"]].concat();
    let chains = run(&[&nft[..], &["-j", "list", "chains"]].concat(), "").await?;
    let mut words = Vec::new();
    for drops in of_others(&chains).into_iter().take(MOST) {
        let list = ["list", "table", &drops.family, &drops.table];
        let listed = run(&[&nft[..], &list].concat(), "").await.unwrap_or_default();
        if !names_ours(&listed) {
            words.push(drops.words(&listed));
        }
    }
    Ok(words)
}

/// Whether somebody has written rules for our interfaces into a table.
fn names_ours(listed: &str) -> bool {
    listed.contains(&format!("iifname \"{VETHS}")) && listed.contains(&format!("oifname \"{VETHS}"))
}

/// The chains that drop, but for Godwit's own.
fn of_others(chains: &str) -> Vec<Drops> {
    let listed: Value = serde_json::from_str(chains).unwrap_or_default();
    let all = listed["nftables"].as_array().into_iter().flatten().map(|entry| &entry["chain"]);
    let is_one = |c: &&Value| {
        c["hook"] == "forward"
            && c["policy"] == "drop"
            && c["family"].as_str().is_some_and(|f| ["ip", "inet"].contains(&f))
            && !c["table"].as_str().is_some_and(|t| t.starts_with("godwit"))
    };
    // What stands in a line for a shell is made of letters alone.
    let word = |value: &Value| {
        let text = value.as_str().unwrap_or_default();
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        (!text.is_empty() && text.chars().all(is_plain)).then(|| text.to_owned())
    };
    let read = |c: &Value| {
        let (family, table, chain) = (word(&c["family"])?, word(&c["table"])?, word(&c["name"])?);
        Some(Drops { family, table, chain })
    };
    all.filter(is_one).filter_map(read).collect()
}

impl Drops {
    /// That it drops, and the lines that let machines through.
    fn words(&self, listed: &str) -> String {
        let Self { family, table, chain } = self;
        // Docker leaves that one alone when it makes its others anew.
        let at = if listed.contains("chain DOCKER-USER {") { "DOCKER-USER" } else { chain };
        let insert = format!("nft insert rule {family} {table} {at}");
        format!(
            "chain '{chain}' of the firewall's table '{family} {table}' drops what machines in networks \
             of kind nat send to the world; let them through with: {insert} iifname '\"{VETHS}*\"' \
             accept && {insert} oifname '\"{VETHS}*\"' ct state established,related accept"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_others_drop_on_the_way_is_told() {
        let chain = |family: &str, table: &str, hook: &str, policy: &str| {
            let of =
                format!(r#""family":"{family}","table":"{table}","name":"FORWARD","handle":1"#);
            let how = format!(r#""type":"filter","hook":"{hook}","prio":0,"policy":"{policy}""#);
            format!(r#"{{"chain":{{{of},{how}}}}}"#)
        };
        let all = [
            r#"{"metainfo":{"version":"1.0.9"}}"#.to_owned(),
            chain("ip", "filter", "forward", "drop"),
            chain("ip6", "filter", "forward", "drop"),
            chain("inet", "a", "forward", "accept"),
            chain("inet", "b", "input", "drop"),
            chain("inet", "godwit_0a1b2", "forward", "drop"),
            chain("inet", "x; reboot", "forward", "drop"),
        ];
        let found = of_others(&format!(r#"{{"nftables":[{}]}}"#, all.join(",")));
        let [drops] = &found[..] else { panic!("{found:?}") };
        let plain = drops.words("table ip filter {");
        assert!(
            plain.contains("nft insert rule ip filter FORWARD iifname '\"gdw*\"' accept"),
            "{plain}"
        );
        let docker = drops.words("table ip filter {\n\tchain DOCKER-USER {\n");
        assert!(docker.contains("insert rule ip filter DOCKER-USER"), "{docker}");
        assert_eq!(of_others("no json"), []);
    }
}
