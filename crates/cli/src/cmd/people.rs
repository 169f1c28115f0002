//! `godwit tenant`, `godwit user`, `godwit token`, `godwit audit`: whose things are, who reaches
//! them, and who did what.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use godwit_cloud::access::Role;
use godwit_cloud::controller::{ApiToken, NewApiToken, NewTenant, NewUser};
use godwit_cloud::daemon::{local_socket, local_token};
use godwit_cloud::registry::{AuditEnd, AuditEntry, TenantRecord, TokenInfo, UserRecord};
use godwit_site::SiteDirs;
use godwit_types::Name;
use reqwest::Method;
use serde_json::json;

use crate::args::{ClientArgs, Named, duration};
use crate::client::{Client, EMPTY};
use crate::failure::{Failure, Outcome, Result};
use crate::out::{self, Row};

#[derive(Debug, Args)]
pub(crate) struct Tenants {
    #[command(flatten)]
    client_args: ClientArgs,
    #[command(subcommand)]
    verb: TenantVerb,
}

#[derive(Debug, Subcommand)]
enum TenantVerb {
    /// List tenants
    #[command(visible_alias = "ls")]
    List,
    /// Make a tenant
    Create {
        /// Its name
        name: Name,
    },
    /// Remove a tenant that has nothing and nobody any more
    #[command(visible_alias = "rm")]
    Delete {
        /// Its name
        name: Name,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Users {
    #[command(flatten)]
    client_args: ClientArgs,
    #[command(subcommand)]
    verb: UserVerb,
}

#[derive(Debug, Subcommand)]
enum UserVerb {
    /// List users
    #[command(visible_alias = "ls")]
    List,
    /// Make a user of the tenant (an operator says of which: --tenant)
    Create {
        /// Its name
        user: Name,
        /// What it is: viewer, member, admin or operator
        #[arg(long, default_value_t = Role::Member, value_name = "ROLE")]
        role: Role,
    },
    /// Remove a user and its tokens
    #[command(visible_alias = "rm")]
    Delete {
        /// Its name
        user: Named,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Tokens {
    #[command(flatten)]
    client_args: ClientArgs,
    #[command(subcommand)]
    verb: TokenVerb,
}

#[derive(Debug, Subcommand)]
enum TokenVerb {
    /// List tokens, without their secrets
    #[command(visible_alias = "ls")]
    List,
    /// Make a token; it is shown this once
    Create {
        /// Its user; you when left out
        #[arg(long)]
        user: Option<Name>,
        /// What it allows, no more than its user may; all of that when left out
        #[arg(long, value_name = "ROLE")]
        role: Option<Role>,
        /// How long it is good, e.g. 8h, 30d; until it is deleted when left out
        #[arg(long, value_parser = duration, value_name = "TIME")]
        lifetime: Option<Duration>,
        /// As root on the center's host, without a token: one of the operator's
        #[arg(long, conflicts_with = "user")]
        local: bool,
        /// The center's socket for that [default: /run/godwit/center/admin.sock]
        #[arg(long, value_name = "FILE", requires = "local")]
        socket: Option<PathBuf>,
    },
    /// Remove a token: it is good for nothing from now on
    #[command(visible_alias = "rm")]
    Delete {
        /// Its id, as `list` shows it
        #[arg(value_parser = token_id)]
        token: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Audit {
    #[command(flatten)]
    client_args: ClientArgs,
    #[command(subcommand)]
    verb: AuditVerb,
}

#[derive(Debug, Subcommand)]
enum AuditVerb {
    /// List the newest entries, oldest first
    #[command(visible_alias = "ls")]
    List {
        /// At most so many, up to 1000
        #[arg(long, default_value_t = 100, value_name = "N")]
        limit: u32,
        /// Only entries before the one of this number
        #[arg(long, value_name = "NUMBER")]
        before: Option<u64>,
    },
    /// Read the whole log: each entry holds the hash of the one before
    Verify,
}

fn token_id(text: &str) -> Result<String, String> {
    if text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit()) {
        Ok(text.to_owned())
    } else {
        Err("a token's id is 16 hex digits; see: godwit token list".into())
    }
}

impl Row for TenantRecord {
    const COLUMNS: &'static [&'static str] = &["NAME", "AGE"];
    const WIDE: usize = 2;
    fn cells(&self) -> Vec<String> {
        vec![self.name.to_string(), out::age(self.created)]
    }
    fn name(&self) -> String {
        self.name.to_string()
    }
}

impl Row for UserRecord {
    const COLUMNS: &'static [&'static str] = &["NAME", "TENANT", "ROLE", "AGE", "ID"];
    const WIDE: usize = 4;
    fn cells(&self) -> Vec<String> {
        vec![
            self.name.to_string(),
            self.tenant.to_string(),
            self.role.to_string(),
            out::age(self.created),
            self.id.to_string(),
        ]
    }
    fn name(&self) -> String {
        out::of_tenant(&self.tenant, &self.name)
    }
}

impl Row for TokenInfo {
    const COLUMNS: &'static [&'static str] =
        &["ID", "USER", "TENANT", "ROLE", "EXPIRES", "AGE", "MADE BY"];
    const WIDE: usize = 6;
    fn cells(&self) -> Vec<String> {
        vec![
            self.id.clone(),
            self.user.to_string(),
            self.tenant.to_string(),
            self.role.to_string(),
            self.expires.map_or_else(|| "never".into(), |end| end.rfc3339()),
            out::age(self.created),
            self.made_by.as_ref().map_or_else(|| self.user.to_string(), ToString::to_string),
        ]
    }
    fn name(&self) -> String {
        self.id.clone()
    }
}

impl Row for AuditEntry {
    const COLUMNS: &'static [&'static str] =
        &["WHEN", "USER", "ACTION", "OBJECT", "OUTCOME", "TENANT", "BY", "NUMBER"];
    const WIDE: usize = 5;
    fn cells(&self) -> Vec<String> {
        vec![
            self.when.rfc3339(),
            self.user.to_string(),
            self.action.clone(),
            self.object.clone(),
            self.outcome.clone(),
            self.tenant.to_string(),
            self.by.as_ref().map_or_else(|| "-".into(), ToString::to_string),
            self.number.to_string(),
        ]
    }
    fn name(&self) -> String {
        self.number.to_string()
    }
}

impl Audit {
    pub(crate) async fn run(self) -> Result {
        let client = Client::open(&self.client_args.connect)?;
        let format = self.client_args.output;
        match self.verb {
            AuditVerb::List { limit, before } => {
                let before = before.map(|n| format!("&before={n}")).unwrap_or_default();
                let path = format!("/v1/audit?limit={limit}{before}");
                let all: Vec<AuditEntry> = client.get(&path).await?;
                out::list(format, &all)?;
            }
            AuditVerb::Verify => {
                let end: AuditEnd = client.get("/v1/audit/end").await?;
                let words = format!("{} entries, whole; the last is {}", end.entries, end.last);
                out::action(format, &words, &end.last.to_string(), &json!(end))?;
            }
        }
        Ok(Outcome::Done)
    }
}

pub(super) async fn remove(
    client_args: &ClientArgs,
    client: &Client,
    path: &str,
    name: &str,
) -> Result {
    client.ask::<(), ()>(Method::DELETE, path, EMPTY).await?;
    out::action(
        client_args.output,
        &format!("{name}   deleted"),
        name,
        &json!({ "deleted": name }),
    )?;
    Ok(Outcome::Done)
}

impl Tenants {
    /// The tenant that the command acts in.
    #[cfg(test)]
    pub(crate) const fn acts_in(&self) -> Option<&Name> {
        self.client_args.connect.tenant.as_ref()
    }

    pub(crate) async fn run(self) -> Result {
        let client = Client::open(&self.client_args.connect)?;
        match self.verb {
            TenantVerb::List => {
                let all: Vec<TenantRecord> = client.get("/v1/tenants").await?;
                out::list(self.client_args.output, &all)?;
            }
            TenantVerb::Create { name } => {
                let new = NewTenant { name };
                let made: TenantRecord =
                    client.ask(Method::POST, "/v1/tenants", Some(&new)).await?;
                let words = format!("{}   made", made.name);
                out::action(self.client_args.output, &words, made.name.as_str(), &json!(made))?;
                out::notice(&format!(
                    "give it an admin: godwit user create NAME --role admin --tenant {}",
                    made.name
                ));
            }
            TenantVerb::Delete { name } => {
                let path = format!("/v1/tenants/{name}");
                return remove(&self.client_args, &client, &path, name.as_str()).await;
            }
        }
        Ok(Outcome::Done)
    }
}

impl Users {
    pub(crate) async fn run(self) -> Result {
        let client = Client::open(&self.client_args.connect)?;
        match self.verb {
            UserVerb::List => {
                let all: Vec<UserRecord> = client.get("/v1/users").await?;
                out::list(self.client_args.output, &all)?;
            }
            UserVerb::Create { user, role } => {
                let new = NewUser { name: user, role: Some(role) };
                let made: UserRecord = client.ask(Method::POST, "/v1/users", Some(&new)).await?;
                let words = format!("{}   made, {} of tenant {}", made.name, role, made.tenant);
                out::action(self.client_args.output, &words, &Row::name(&made), &json!(made))?;
                out::notice(&format!(
                    "give it a token: godwit token create --user {} --tenant {}",
                    made.name, made.tenant
                ));
            }
            UserVerb::Delete { user } => {
                let path = format!("/v1/users/{}", user.path());
                return remove(&self.client_args, &client, &path, user.as_str()).await;
            }
        }
        Ok(Outcome::Done)
    }
}

/// The usual name of a center's own site.
fn center() -> Result<Name> {
    Name::new("center").map_err(|e| Failure::internal(e.to_string()))
}

fn print_token(client_args: &ClientArgs, made: &ApiToken) -> Result {
    // Alone, so that it can be sent to a file.
    out::action(client_args.output, &made.token, &made.token, &json!(made))?;
    let info = &made.info;
    out::notice(&format!(
        "token {} of {}, {} of tenant {}; it is not shown again",
        info.id, info.user, info.role, info.tenant
    ));
    Ok(Outcome::Done)
}

impl Tokens {
    pub(crate) async fn run(self) -> Result {
        if let TokenVerb::Create { role, lifetime, local: true, socket, .. } = self.verb {
            let lifetime_s = lifetime.map(|t| t.as_secs());
            let want = NewApiToken { user: None, role, lifetime_s };
            let usual = || Ok::<_, Failure>(local_socket(&SiteDirs::usual(&center()?).run));
            let socket = socket.map_or_else(usual, Ok)?;
            return print_token(&self.client_args, &local_token(&socket, &want).await?);
        }
        let client = Client::open(&self.client_args.connect)?;
        match self.verb {
            TokenVerb::List => {
                let all: Vec<TokenInfo> = client.get("/v1/api-tokens").await?;
                out::list(self.client_args.output, &all)?;
            }
            TokenVerb::Create { user, role, lifetime, .. } => {
                let lifetime_s = lifetime.map(|t| t.as_secs());
                let new = NewApiToken { user, role, lifetime_s };
                let made: ApiToken = client.ask(Method::POST, "/v1/api-tokens", Some(&new)).await?;
                return print_token(&self.client_args, &made);
            }
            TokenVerb::Delete { token } => {
                let path = format!("/v1/api-tokens/{token}");
                return remove(&self.client_args, &client, &path, &token).await;
            }
        }
        Ok(Outcome::Done)
    }
}
