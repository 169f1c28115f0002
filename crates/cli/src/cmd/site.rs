//! `godwit site`: center, APs and devices.

use std::time::Duration;

use clap::{Args, Subcommand};
use godwit_cloud::api::{NewToken, Token, TokenText, TokenUse};
use godwit_cloud::daemon::join_site;
use godwit_cloud::registry::{EventKind, SiteRecord};
use godwit_transfer::JoinToken;
use godwit_types::UnixMs;
use godwit_types::{Name, SiteKind, SiteState};
use reqwest::Method;
use serde::Serialize;
use serde_json::json;

use super::role::{identity_of, read_join_token};
use crate::args::{ClientArgs, Places, duration};
use crate::client::{Client, EMPTY};
use crate::failure::{Failure, Outcome, Result};
use crate::out::{self, Row};
use crate::watch::{Watch, Watched, watch};

#[derive(Debug, Args)]
pub(crate) struct CommandArgs {
    #[command(flatten)]
    client_args: ClientArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List sites
    #[command(visible_alias = "ls")]
    List {
        /// Keep the list up to date
        #[arg(short, long)]
        watch: bool,
    },
    /// Make a token with which one site can join this center; list or withdraw such tokens
    #[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
    Token {
        #[command(subcommand)]
        verb: Option<TokenVerb>,
        /// Name that the site will have
        #[arg(required = true)]
        site: Option<Name>,
        /// What it will be: ap or device
        #[arg(long, value_parser = kind, default_value = "ap", value_name = "KIND")]
        kind: SiteKind,
        /// How long the token is good, at most 7d
        #[arg(long, value_parser = duration, default_value = "1h", value_name = "TIME")]
        lifetime: Duration,
    },
    /// Throw a site out: its certificates and its join tokens are good for nothing any more
    Revoke {
        /// Its name
        site: Name,
    },
    /// Let this machine join a center as the site that the token names
    Join {
        /// Where the token is: `@FILE`, or `-` for stdin
        token: String,
        /// Join anew where the site has joined before, as after it was revoked
        #[arg(long)]
        replace: bool,
        #[command(flatten)]
        places: Places,
    },
}

#[derive(Debug, Subcommand)]
enum TokenVerb {
    /// List the tokens of the last weeks and what became of them
    #[command(visible_alias = "ls")]
    List,
    /// Take back a token that nobody has used
    Withdraw {
        /// Its id, as `list` shows it
        #[arg(value_parser = token_id)]
        token: String,
    },
}

fn token_id(text: &str) -> Result<String, String> {
    if text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit()) {
        Ok(text.to_owned())
    } else {
        Err("a token's id is 16 hex digits; see: godwit site token list".into())
    }
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
        "PROMISED",
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
            format!("{} of {}", mib(r.memory_promised_mib), mib(r.memory_promise_mib)),
            r.version.clone(),
            s.joined.rfc3339(),
        ]
    }
    fn name(&self) -> String {
        self.record.name.to_string()
    }
}

impl Watch for Seen {
    const KIND: EventKind = EventKind::Site;
    // Load and room.
    const MOVES: bool = true;
    type Record = SiteRecord;
    fn of(record: SiteRecord) -> Self {
        Self::from(record)
    }
    fn key(&self) -> String {
        self.record.name.to_string()
    }
}

impl Row for Token {
    const COLUMNS: &'static [&'static str] = &["ID", "SITE", "KIND", "STATE", "EXPIRES"];
    const WIDE: usize = 5;
    fn cells(&self) -> Vec<String> {
        let state = match self.state {
            TokenUse::Unused => "unused",
            TokenUse::Used => "used",
            TokenUse::Withdrawn => "withdrawn",
            TokenUse::Expired => "expired",
        };
        vec![
            self.id.clone(),
            self.site.to_string(),
            self.kind.to_string(),
            state.into(),
            self.expires.rfc3339(),
        ]
    }
    fn name(&self) -> String {
        self.id.clone()
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

impl CommandArgs {
    pub(crate) async fn run(self) -> Result {
        let format = self.client_args.output;
        match self.verb {
            Verb::List { watch: true } => {
                let keep = Box::new(|_: &Seen| true);
                let what = Watched { list: "/v1/sites", only: None, keep };
                return watch(&self.client_args, what).await;
            }
            Verb::List { watch: false } => {
                let client = Client::open(&self.client_args.connect)?;
                out::list(format, &sites(&client).await?)?;
            }
            Verb::Token { verb: Some(TokenVerb::List), .. } => {
                let client = Client::open(&self.client_args.connect)?;
                let all: Vec<Token> = client.get("/v1/tokens").await?;
                out::list(format, &all)?;
            }
            Verb::Token { verb: Some(TokenVerb::Withdraw { token }), .. } => {
                let client = Client::open(&self.client_args.connect)?;
                let path = format!("/v1/tokens/{token}");
                client.ask::<(), ()>(Method::DELETE, &path, EMPTY).await?;
                let words = format!("{token}   withdrawn");
                out::action(format, &words, &token, &json!({ "token": token }))?;
            }
            Verb::Revoke { site } => {
                let client = Client::open(&self.client_args.connect)?;
                let path = format!("/v1/sites/{site}");
                client.ask::<(), ()>(Method::DELETE, &path, EMPTY).await?;
                let words = format!("{site}   revoked");
                out::action(format, &words, site.as_str(), &json!({ "site": site }))?;
            }
            Verb::Token { verb: None, site, kind, lifetime } => {
                let site = site.ok_or_else(|| Failure::usage("which site is it for?"))?;
                let client = Client::open(&self.client_args.connect)?;
                let t = token(&client, &site, kind, lifetime).await?;
                out::action(format, &t.token, &t.token, &json!(t))?;
                out::notice(&format!(
                    "on the machine that is to be {site}: godwit site join - (and paste it there)"
                ));
            }
            Verb::Join { token, replace, places } => {
                let text = read_join_token(&token)?;
                let named = text.parse::<JoinToken>().map_err(|e| Failure::usage(e.to_string()))?;
                let dirs = places.dirs(&named.site);
                if identity_of(&dirs).exists() && !replace {
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
                let again = if replace { "start its daemon anew" } else { "run it with" };
                out::notice(&format!("{again}: godwit ap --name {site}{flags}"));
            }
        }
        Ok(Outcome::Done)
    }
}
