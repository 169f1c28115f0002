//! `godwit site`: center, APs and devices.

use std::time::Duration;

use clap::{Args, Subcommand};
use godwit_cloud::api::{NewToken, TokenText};
use godwit_cloud::clock::UnixMs;
use godwit_cloud::daemon::join_site;
use godwit_cloud::registry::SiteRecord;
use godwit_transfer::JoinToken;
use godwit_types::{Name, SiteKind, SiteState};
use reqwest::Method;
use serde::Serialize;
use serde_json::json;

use super::role::{identity_of, read_join_token};
use crate::args::{Places, Talk, duration};
use crate::client::Client;
use crate::failure::{Failure, Outcome, Result};
use crate::out::{self, Row};

#[derive(Debug, Args)]
pub(crate) struct Noun {
    #[command(flatten)]
    talk: Talk,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List sites
    #[command(visible_alias = "ls")]
    List,
    /// Make a token with which one site can join this center
    Token {
        /// Name that the site will have
        site: Name,
        /// What it will be: ap or device
        #[arg(long, value_parser = kind, default_value = "ap", value_name = "KIND")]
        kind: SiteKind,
        /// How long the token is good, at most 7d
        #[arg(long, value_parser = duration, default_value = "1h", value_name = "TIME")]
        lifetime: Duration,
    },
    /// Let this machine join a center as the site that the token names
    Join {
        /// The token, `@FILE`, or `-` for stdin
        token: String,
        #[command(flatten)]
        places: Places,
    },
}

fn kind(text: &str) -> Result<SiteKind, String> {
    match text {
        "ap" => Ok(SiteKind::Ap),
        "device" => Ok(SiteKind::Device),
        _ => Err("it is ap or device".into()),
    }
}

/// A site and whether it can be used.
#[derive(Debug, Serialize)]
pub(super) struct Seen {
    pub(super) state: SiteState,
    #[serde(flatten)]
    pub(super) record: SiteRecord,
}

impl From<SiteRecord> for Seen {
    fn from(record: SiteRecord) -> Self {
        Self { state: record.state(UnixMs::now()), record }
    }
}

impl Row for Seen {
    const COLUMNS: &'static [&'static str] = &[
        "NAME",
        "KIND",
        "STATE",
        "VMS",
        "MEM-FREE",
        "LOAD",
        "RTT",
        "CPUS",
        "ACCEL",
        "QEMU",
        "DISK-FREE",
        "RAMFILES-FREE",
        "VERSION",
        "JOINED",
    ];
    const WIDE: usize = 7;
    fn cells(&self) -> Vec<String> {
        let (s, r) = (&self.record, &self.record.report);
        let state = if s.revoked { "revoked".into() } else { self.state.to_string() };
        let mib = |m: u64| out::size(m << 20);
        vec![
            s.name.to_string(),
            s.kind.to_string(),
            state,
            r.vms.to_string(),
            mib(r.memory_free_mib),
            format!("{:.1}", r.load),
            r.rtt_ms.map(out::millis).unwrap_or_default(),
            r.cpus.to_string(),
            r.accel.clone(),
            r.qemu.clone(),
            mib(r.disk_free_mib),
            mib(r.ram_files_free_mib),
            r.version.clone(),
            s.joined.rfc3339(),
        ]
    }
    fn name(&self) -> String {
        self.record.name.to_string()
    }
}

/// All sites.
pub(super) async fn sites(client: &Client) -> Result<Vec<Seen>> {
    let all: Vec<SiteRecord> = client.get("/v1/sites").await?;
    Ok(all.into_iter().map(Seen::from).collect())
}

/// A join token from the center.
pub(super) async fn token(
    client: &Client,
    site: &Name,
    kind: SiteKind,
    lifetime: Duration,
) -> Result<TokenText> {
    let want =
        NewToken { site: site.clone(), kind: Some(kind), lifetime_s: Some(lifetime.as_secs()) };
    client.ask(Method::POST, "/v1/tokens", Some(&want)).await
}

impl Noun {
    pub(crate) async fn run(self) -> Result {
        let format = self.talk.output;
        match self.verb {
            Verb::List => {
                let client = Client::open(&self.talk.connect)?;
                out::list(format, &sites(&client).await?)?;
            }
            Verb::Token { site, kind, lifetime } => {
                let client = Client::open(&self.talk.connect)?;
                let t = token(&client, &site, kind, lifetime).await?;
                out::action(format, &t.token, &t.token, &json!(t))?;
                out::talk(&format!("on the machine that is to be {site}: godwit site join TOKEN"));
            }
            Verb::Join { token, places } => {
                let text = read_join_token(&token)?;
                let named = text.parse::<JoinToken>().map_err(|e| Failure::usage(e.to_string()))?;
                let dirs = places.dirs(&named.site);
                if identity_of(&dirs).exists() {
                    let words = format!("{}   joined already", named.site);
                    let data = json!({ "site": named.site, "unchanged": true });
                    out::action(format, &words, named.site.as_str(), &data)?;
                    return Ok(Outcome::Unchanged);
                }
                let site = join_site(&text, &dirs).await?;
                let words = format!("{site}   joined the center at {}", named.center);
                let data = json!({ "site": site, "center": named.center });
                out::action(format, &words, site.as_str(), &data)?;
                let flags = places.flags();
                out::talk(&format!("run it with: godwit ap --name {site}{flags}"));
            }
        }
        Ok(Outcome::Done)
    }
}
