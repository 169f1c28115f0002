//! Every path of the API, asked by every role of a foreign tenant and by a viewer of the own.

use axum::Router;
use std::collections::{BTreeMap, BTreeSet};

use axum::http::Method;
use godwit_site::{
    ByteStream, Call, NetworkKind, Prefix, SiteHost, SiteReply, SiteRequest, StreamRequest,
};
use godwit_types::{Mib, NetworkId, SubstrateId, SubstrateKind, UnixMs, VmState};

use super::tests::{NoGate, fault, send_as};
use super::*;
use crate::access::{Role, default_tenant};
use crate::controller::tests::{Send, World, name, world};
use crate::ops::OpKind;
use crate::registry::{Drawn, NetworkRecord, OpRecord, SubstrateRecord, TenantRecord, VmRecord};

/// What a path is about, and so what a foreigner and a viewer of the own tenant may expect.
#[derive(Debug, Clone, Copy, PartialEq)]
enum About {
    /// One machine, substrate, operation, user or token, named in the path. `changes`: a viewer may
    /// not.
    One { changes: bool },
    /// One tenant; all changes are the operator's.
    Tenant,
    /// One tenant, seen by its users.
    TenantSeen,
    /// A list of what is one's own.
    List,
    /// The same, for an admin alone.
    AdminList,
    /// Makes something in one's own tenant: not for a viewer.
    Make,
    /// A viewer may do that as well: look at sites, make a token of its own.
    Anybody,
    /// For operators alone.
    Operators,
    /// What changes, told of to whom it is there: tested where it is served.
    Stream,
}

/// Every path and method of the API, and a body that is understood.
fn paths() -> BTreeMap<(&'static str, &'static str), (About, &'static str)> {
    use About::{AdminList, Anybody, List, Make, One, Operators, Stream, Tenant, TenantSeen};
    let (reads, changes) = (One { changes: false }, One { changes: true });
    BTreeMap::from([
        (("get", "/healthz"), (Anybody, "")),
        (("get", "/metrics"), (Operators, "")),
        (("get", "/v1/sites"), (Anybody, "")),
        (("get", "/v1/sites/{name}"), (Anybody, "")),
        (("delete", "/v1/sites/{name}"), (Operators, "")),
        (("get", "/v1/tokens"), (Operators, "")),
        (("post", "/v1/tokens"), (Operators, r#"{"site":"bar"}"#)),
        (("delete", "/v1/tokens/{id}"), (Operators, "")),
        (("get", "/v1/tenants"), (List, "")),
        (("post", "/v1/tenants"), (Operators, r#"{"name":"third"}"#)),
        (("delete", "/v1/tenants/{tenant}"), (Tenant, "")),
        (("get", "/v1/tenants/{tenant}/quota"), (TenantSeen, "")),
        (("put", "/v1/tenants/{tenant}/quota"), (Tenant, "{}")),
        (("get", "/v1/networks"), (List, "")),
        (("post", "/v1/networks"), (Make, r#"{"name":"mine"}"#)),
        (("get", "/v1/networks/{network}"), (reads, "")),
        (("delete", "/v1/networks/{network}"), (changes, "")),
        (("get", "/v1/users"), (List, "")),
        (("post", "/v1/users"), (Make, r#"{"name":"zoe"}"#)),
        (("delete", "/v1/users/{user}"), (changes, "")),
        (("get", "/v1/api-tokens"), (List, "")),
        (("post", "/v1/api-tokens"), (Anybody, "")),
        (("delete", "/v1/api-tokens/{id}"), (changes, "")),
        (("get", "/v1/audit"), (AdminList, "")),
        (("get", "/v1/audit/end"), (Operators, "")),
        (("get", "/v1/images"), (Anybody, "")),
        (("get", "/v1/images/{name}"), (Anybody, "")),
        (("delete", "/v1/images/{name}"), (Operators, "")),
        (("post", "/v1/images/{name}/build"), (Operators, "")),
        (("get", "/v1/vms"), (List, "")),
        (("post", "/v1/vms"), (Make, r#"{"image":"tiny"}"#)),
        (("get", "/v1/vms/{vm}"), (reads, "")),
        (("delete", "/v1/vms/{vm}"), (changes, "")),
        (("post", "/v1/vms/{vm}/start"), (changes, "")),
        (("post", "/v1/vms/{vm}/stop"), (changes, "")),
        (("post", "/v1/vms/{vm}/dock"), (changes, "{}")),
        (("post", "/v1/vms/{vm}/migrate"), (changes, "{}")),
        (("get", "/v1/vms/{vm}/console"), (reads, "")),
        (("get", "/v1/vms/{vm}/screenshot"), (reads, "")),
        (("post", "/v1/vms/{vm}/type"), (changes, r#"{"text":"x"}"#)),
        (("post", "/v1/vms/{vm}/exec"), (changes, r#"{"path":"/bin/true"}"#)),
        (("get", "/v1/vms/{vm}/exec/{pid}"), (changes, "")),
        (("get", "/v1/vms/{vm}/view"), (changes, "")),
        (("get", "/v1/vms/{vm}/attach"), (changes, "")),
        (("get", "/v1/substrates"), (List, "")),
        (("post", "/v1/substrates"), (Make, "GWSA")),
        (("get", "/v1/substrates/{substrate}"), (reads, "")),
        (("delete", "/v1/substrates/{substrate}"), (changes, "")),
        (("get", "/v1/substrates/{substrate}/export"), (changes, "")),
        (("post", "/v1/substrates/{substrate}/rebuild"), (changes, "")),
        (("post", "/v1/substrates/{substrate}/grants"), (changes, r#"{"tenant":"acme"}"#)),
        (("delete", "/v1/substrates/{substrate}/grants/{tenant}"), (changes, "")),
        (("get", "/v1/ops"), (List, "")),
        (("get", "/v1/ops/{id}"), (reads, "")),
        (("get", "/v1/ops/{id}/events"), (reads, "")),
        (("post", "/v1/ops/{id}/cancel"), (changes, "")),
        (("get", "/v1/events"), (Stream, "")),
        (("get", "/v1/pool"), (Operators, "")),
        (("post", "/v1/pool/{site}/check"), (Operators, "")),
    ])
}

/// What a tenant has.
struct Has {
    network: NetworkRecord,
    vm: VmRecord,
    substrate: SubstrateRecord,
    op: OpRecord,
    token: String,
    user: Name,
}

fn substrate(n: &str, tenant: &Name, owner: &Name, kind: SubstrateKind) -> SubstrateRecord {
    SubstrateRecord {
        id: SubstrateId::new(),
        name: name(n),
        tenant: tenant.clone(),
        kind,
        owner: owner.clone(),
        granted: BTreeSet::new(),
        image: name("tiny"),
        arch: godwit_types::Arch::X86_64,
        memory: Mib(128),
        vcpus: 1,
        raw_bytes: 1,
        stored_bytes: 1,
        created: UnixMs(1),
        holders: BTreeSet::new(),
        content: None,
        damaged: BTreeMap::new(),
    }
}

/// Enters a tenant with one of everything; what it has is named after `prefix`.
fn furnish(w: &World, tenant: &str, prefix: &str) -> Has {
    let (c, tenant, me) = (&w.c, name(tenant), Principal::operator());
    let reg = c.registry();
    reg.people().tenant_add(&me, &TenantRecord::new(tenant.clone())).expect("tenant");
    let user = name(&format!("{prefix}-user"));
    let user = reg.people().user_add(&me, &tenant, &user, Role::Admin).expect("user");
    let of = Principal::of(&user);
    let vm = VmRecord {
        tenant: tenant.clone(),
        state: VmState::Running,
        ..crate::registry::tests::vm(&format!("{prefix}-vm"))
    };
    let mut op = OpRecord::begun(&of, OpKind::VmStop { vm: vm.id, name: vm.name.clone() });
    op.state = godwit_types::OpState::Done;
    reg.vm_add(&vm, Some(&op)).expect("machine");
    let kind = SubstrateKind::Restricted;
    let substrate = substrate(&format!("{prefix}-sub"), &tenant, &user.name, kind);
    reg.substrate_add(&substrate).expect("substrate");
    let drawn = Drawn::new(user.id, Role::Member, None);
    reg.people().token_add(&me, &drawn.record).expect("token");
    let network = NetworkRecord {
        id: NetworkId::new(),
        name: name(&format!("{prefix}-net")),
        tenant,
        kind: NetworkKind::Nat,
        prefix: Prefix::DEFAULT,
        created: UnixMs::now(),
    };
    reg.networks().add(&of, &network).expect("network");
    Has { network, vm, substrate, op, token: drawn.record.id, user: user.name }
}

impl Has {
    /// The ways to name what `{param}` of a path stands for.
    fn names(&self, tenant: &str, path: &str) -> Vec<String> {
        let full = |n: &Name| format!("{tenant}%2F{n}");
        match path.split('/').nth(2) {
            Some("vms") => {
                vec![self.vm.id.to_string(), self.vm.name.to_string(), full(&self.vm.name)]
            }
            Some("substrates") => {
                let s = &self.substrate;
                vec![s.id.to_string(), s.name.to_string(), full(&s.name)]
            }
            Some("networks") => {
                vec![
                    self.network.id.to_string(),
                    self.network.name.to_string(),
                    full(&self.network.name),
                ]
            }
            Some("ops") => vec![self.op.id.to_string()],
            Some("users") => vec![self.user.to_string(), full(&self.user)],
            Some("api-tokens") => vec![self.token.clone()],
            Some("tenants") => vec![tenant.to_owned()],
            _ => panic!("what does {path} name?"),
        }
    }
}

/// `path` with its object named so.
fn with(path: &str, named: &str) -> String {
    let (before, rest) = path.split_once('{').expect("a parameter");
    let (_, after) = rest.split_once('}').expect("its end");
    format!("{before}{named}{}", after.replace("{pid}", "7").replace("{tenant}", "acme"))
}

fn router(w: &World) -> Router {
    super::tests::whole(&Api::new(w.c.clone(), Arc::new(NoGate), "secret"))
}

/// A token of a new user of acme.
fn token_of(w: &World, role: Role) -> String {
    let user = w.c.registry().people().user_add(
        &Principal::operator(),
        &name("acme"),
        &name(&format!("a-{role}")),
        role,
    );
    let drawn = Drawn::new(user.expect("user").id, role, None);
    w.c.registry().people().token_add(&Principal::operator(), &drawn.record).expect("token");
    drawn.text
}

/// All that is written down, but for what changes by itself.
fn all(w: &World) -> String {
    let r = w.c.registry();
    let ops: Vec<_> = r.ops().all().expect("ops").into_iter().map(|o| (o.id, o.state)).collect();
    let (vms, substrates) = (r.vms().expect("vms"), r.substrates().expect("substrates"));
    format!(
        "{vms:?}{substrates:?}{ops:?}{:?}{:?}{:?}",
        r.people().tenants(),
        r.people().users(),
        (r.people().tokens(), r.networks().all())
    )
}

fn described() -> BTreeSet<(String, String)> {
    let spec = serde_json::to_value(openapi()).expect("json");
    let paths = spec["paths"].as_object().expect("paths").iter();
    let of = |(p, methods): (&String, &serde_json::Value)| {
        let all = methods.as_object().expect("methods").keys();
        all.map(|m| (m.clone(), p.clone())).collect::<Vec<_>>()
    };
    paths.flat_map(of).collect()
}

#[test]
fn every_path_of_the_api_is_walked_by_the_tests_of_access() {
    let walked = paths().into_keys().map(|(m, p)| (m.to_owned(), p.to_owned()));
    assert_eq!(described(), walked.collect(), "say what a new path is about, in `paths`");
}

#[tokio::test]
async fn nothing_of_another_tenant_is_seen_or_changed_by_any_path() {
    let w = world(Send::Works).await;
    let r = router(&w);
    let other = furnish(&w, "other", "their");
    furnish(&w, "acme", "our");
    let tokens = [Role::Viewer, Role::Member, Role::Admin].map(|role| (role, token_of(&w, role)));
    let before = all(&w);
    for ((method, path), (about, body)) in paths() {
        for (role, token) in &tokens {
            let m: Method = method.to_uppercase().parse().expect("method");
            let ask = async |path: &str| send_as(&r, m.clone(), path, token, body).await;
            let shown = format!("{method} {path} by a foreign {role}");
            match about {
                About::One { .. } | About::Tenant | About::TenantSeen => {
                    for named in other.names("other", path) {
                        let (status, text) = ask(&with(path, &named)).await;
                        assert_eq!(status, StatusCode::NOT_FOUND, "{shown}: {named}: {text}");
                        // In the words that tell of one that is not there.
                        let absent = match named.parse::<uuid::Uuid>() {
                            Ok(_) => uuid::Uuid::nil().to_string(),
                            Err(_) => format!("{}x", &named[..named.len() - 1]),
                        };
                        let (_, nothing) = ask(&with(path, &absent)).await;
                        let (named, absent) =
                            (named.replace("%2F", "/"), absent.replace("%2F", "/"));
                        assert_eq!(text, nothing.replace(&absent, &named), "{shown}");
                    }
                }
                About::List | About::AdminList => {
                    let (status, text) = ask(path).await;
                    let sees = about == About::List || *role == Role::Admin;
                    let want = if sees { StatusCode::OK } else { StatusCode::FORBIDDEN };
                    assert_eq!(status, want, "{shown}: {text}");
                    for foreign in ["their-", "\"other\"", &other.token, &other.vm.id.to_string()] {
                        assert!(!text.contains(foreign), "{shown}: {text}");
                    }
                }
                About::Operators => {
                    let (status, text) = ask(&path.replace(['{', '}'], "")).await;
                    assert_eq!(status, StatusCode::FORBIDDEN, "{shown}: {text}");
                    assert_eq!(fault(&text).code, Code::Forbidden, "{shown}");
                }
                About::Make | About::Anybody | About::Stream => {}
            }
        }
    }
    assert_eq!(before, all(&w), "nothing is changed");
}

#[tokio::test]
async fn a_viewer_sees_what_its_tenant_has_and_changes_nothing() {
    let w = world(Send::Works).await;
    let r = router(&w);
    let ours = furnish(&w, "acme", "our");
    let token = token_of(&w, Role::Viewer);
    let before = all(&w);
    for ((method, path), (about, body)) in paths() {
        let m: Method = method.to_uppercase().parse().expect("method");
        let ask = async |path: &str| send_as(&r, m.clone(), path, &token, body).await;
        let shown = format!("{method} {path}");
        match about {
            About::One { changes } => {
                for named in ours.names("acme", path) {
                    let (status, text) = ask(&with(path, &named)).await;
                    // A colleague's token is no more there for it than a foreigner's.
                    let want = match path.contains("api-tokens") {
                        true => StatusCode::NOT_FOUND,
                        false => StatusCode::FORBIDDEN,
                    };
                    if changes {
                        assert_eq!(status, want, "{shown}: {named}: {text}");
                    } else {
                        // A site of paper shows no console and no screen.
                        assert_ne!(status, StatusCode::FORBIDDEN, "{shown}: {named}: {text}");
                        assert_ne!(status, StatusCode::NOT_FOUND, "{shown}: {named}: {text}");
                    }
                }
            }
            About::Tenant => {
                let (status, text) = ask(&with(path, "acme")).await;
                assert_eq!(status, StatusCode::FORBIDDEN, "{shown}: {text}");
            }
            About::TenantSeen => {
                let (status, text) = ask(&with(path, "acme")).await;
                assert_eq!(status, StatusCode::OK, "{shown}: {text}");
            }
            About::List => {
                let (status, text) = ask(path).await;
                assert_eq!(status, StatusCode::OK, "{shown}: {text}");
                assert!(path.contains("tokens") || text.contains("acme"), "{shown}: {text}");
            }
            About::Make | About::Operators | About::AdminList => {
                let query = if path == "/v1/substrates" { "?name=mine" } else { "" };
                let path = format!("{}{query}", path.replace(['{', '}'], ""));
                let (status, text) = ask(&path).await;
                assert_eq!(status, StatusCode::FORBIDDEN, "{shown}: {text}");
            }
            // What it may as well: sites and images, and a token of its own.
            About::Anybody if method == "get" => {
                let named = if path.contains("images") { "tiny" } else { "center" };
                let path = path.replace("{name}", named);
                let (status, text) = ask(&path).await;
                assert_eq!(status, StatusCode::OK, "{shown}: {text}");
            }
            About::Anybody | About::Stream => {}
        }
    }
    assert_eq!(before, all(&w), "nothing is changed");
}

#[tokio::test]
async fn foreign_things_named_in_a_body_or_a_header_are_not_there_either() {
    let w = world(Send::Works).await;
    let r = router(&w);
    let other = furnish(&w, "other", "their");
    furnish(&w, "acme", "our");
    let token = token_of(&w, Role::Admin);
    let post = async |path: &str, body: &str| send_as(&r, Method::POST, path, &token, body).await;
    let s = &other.substrate;
    for named in [s.id.to_string(), s.name.to_string(), format!("other/{}", s.name)] {
        let body = format!(r#"{{"substrate":"{named}"}}"#);
        let (status, text) = post("/v1/vms", &body).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{named}: {text}");
        assert_eq!(fault(&text).message, format!("no substrate '{named}'"));
    }
    let (status, text) = post("/v1/api-tokens", r#"{"user":"their-user"}"#).await;
    assert_eq!(status, StatusCode::NOT_FOUND, "{text}");
    for (path, body) in [
        ("/v1/vms/our-vm/dock", r#"{"kind":"public"}"#),
        ("/v1/users", r#"{"name":"eve","role":"operator"}"#),
        ("/v1/api-tokens", r#"{"role":"operator"}"#),
    ] {
        let (status, text) = post(path, body).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{path} {body}: {text}");
    }
    for (tenant, want) in [("other", 404), ("nobody", 404), ("acme", 200)] {
        let request = axum::http::Request::builder()
            .uri("/v1/vms")
            .header(AUTHORIZATION, format!("Bearer {token}"))
            .header(TENANT_HEADER, tenant)
            .body(Body::empty())
            .expect("request");
        let answer = tower::ServiceExt::oneshot(r.clone(), request).await.expect("answer");
        assert_eq!(answer.status().as_u16(), want, "{tenant}");
    }
    // Nobody but an operator acts in another tenant, by whatever path.
    let before = all(&w);
    for ((method, path), (_, body)) in paths() {
        let path = path.replace(['{', '}'], "");
        let request = axum::http::Request::builder()
            .method(Method::from_bytes(method.to_uppercase().as_bytes()).expect("method"))
            .uri(&path)
            .header(AUTHORIZATION, format!("Bearer {token}"))
            .header(TENANT_HEADER, "other")
            .header(CONTENT_TYPE, "application/json")
            .body(Body::from(body))
            .expect("request");
        let answer = tower::ServiceExt::oneshot(r.clone(), request).await.expect("answer");
        let open = path == "/healthz";
        let want = if open { StatusCode::OK } else { StatusCode::NOT_FOUND };
        assert_eq!(answer.status(), want, "{method} {path}");
    }
    assert_eq!(before, all(&w), "nothing is changed");
}

#[tokio::test]
async fn names_are_per_tenant_and_an_operator_says_whose() {
    let w = world(Send::Works).await;
    let r = router(&w);
    furnish(&w, "acme", "a");
    furnish(&w, "other", "b");
    let make = r#"{"name":"web","image":"tiny"}"#;
    let token = token_of(&w, Role::Member);
    for (token, again) in [(&token[..], 409), ("secret", 409)] {
        let (status, text) = send_as(&r, Method::POST, "/v1/vms", token, make).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{text}");
        let (status, _) = send_as(&r, Method::POST, "/v1/vms", token, make).await;
        assert_eq!(status.as_u16(), again);
    }
    let get = async |path: &str, token: &str| {
        let (status, text) = send_as(&r, Method::GET, path, token, "").await;
        assert_eq!(status, StatusCode::OK, "{path}: {text}");
        serde_json::from_str::<VmRecord>(&text).expect("a machine")
    };
    let ours = get("/v1/vms/web", &token).await;
    let default = get("/v1/vms/web", "secret").await;
    assert_eq!((&ours.tenant, &default.tenant), (&name("acme"), &default_tenant()));
    assert_eq!(get("/v1/vms/acme%2Fweb", "secret").await.id, ours.id);
    assert_eq!(get("/v1/vms/acme%2Fweb", &token).await.id, ours.id);
    let (_, text) = send_as(&r, Method::GET, "/v1/vms", "secret", "").await;
    let seen: Vec<VmRecord> = serde_json::from_str(&text).expect("machines");
    assert_eq!(seen.len(), 4, "an operator sees all: {text}");
}

#[tokio::test]
async fn what_is_public_or_granted_is_used_and_not_changed() {
    let w = world(Send::Works).await;
    let r = router(&w);
    furnish(&w, "acme", "a");
    let other = furnish(&w, "other", "b");
    let token = token_of(&w, Role::Admin);
    let reg = w.c.registry();
    let op = name("operator");
    let held = |mut s: SubstrateRecord| {
        s.holders = [name("center")].into();
        reg.substrate_add(&s).expect("added");
        s.name
    };
    let public = held(substrate("clean", &default_tenant(), &op, SubstrateKind::Public));
    let granted = SubstrateRecord {
        granted: [name("acme")].into(),
        ..substrate("lent", &name("other"), &other.user, SubstrateKind::Restricted)
    };
    let granted = format!("other%2F{}", held(granted));
    let private = substrate("mine", &name("acme"), &name("a-user"), SubstrateKind::Private);
    let private = held(private);
    // What is private is used by its owner alone, and an admin may remove it.
    for (named, make, delete) in
        [(public.as_str(), 202, 403), (&granted, 202, 403), (private.as_str(), 403, 200)]
    {
        let path = format!("/v1/substrates/{named}");
        let (status, text) = send_as(&r, Method::GET, &path, &token, "").await;
        assert_eq!(status, StatusCode::OK, "{named}: {text}");
        let body = format!(r#"{{"substrate":"{}"}}"#, named.replace("%2F", "/"));
        let (status, text) = send_as(&r, Method::POST, "/v1/vms", &token, &body).await;
        assert_eq!(status.as_u16(), make, "{named}: {text}");
        let (status, text) = send_as(&r, Method::DELETE, &path, &token, "").await;
        assert_eq!(status.as_u16(), delete, "{named}: {text}");
    }
}

/// A site that takes files in, and what they come by.
struct Takes {
    name: Name,
    come: std::sync::Mutex<Option<(godwit_site::Upload, tokio::io::DuplexStream)>>,
    paper: Arc<dyn SiteHost>,
}

#[async_trait::async_trait]
impl SiteHost for Takes {
    fn name(&self) -> &Name {
        &self.name
    }
    async fn answer(&self, request: SiteRequest, call: Call) -> Result<SiteReply, Fault> {
        self.paper.answer(request, call).await
    }
    async fn open(&self, request: StreamRequest) -> Result<ByteStream, Fault> {
        let StreamRequest::SubstrateUpload(want) = request else {
            return Err(Fault::invalid("only files"));
        };
        let (center, site) = tokio::io::duplex(1 << 20);
        *self.come.lock().expect("lock") = Some((want, site));
        Ok(Box::pin(center))
    }
}

#[tokio::test]
async fn a_file_that_has_come_whole_is_listed_though_its_sender_has_hung_up() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let w = world(Send::Works).await;
    let r = router(&w);
    furnish(&w, "acme", "our");
    let token = token_of(&w, Role::Member);
    let (come, paper) = (std::sync::Mutex::default(), w.cafe.clone());
    let bar = Arc::new(Takes { name: name("bar"), come, paper });
    w.c.attach(bar.clone(), SiteKind::Ap).await.expect("attached");
    let path = "/v1/substrates?name=file&site=bar";
    let sent = send_as(&r, Method::POST, path, &token, "GWSA");
    tokio::time::timeout(Duration::from_millis(300), sent).await.expect_err("no verdict yet");
    let (want, mut site) = bar.come.lock().expect("lock").take().expect("opened");
    let mut file = String::new();
    site.read_to_string(&mut file).await.expect("read");
    assert_eq!(file, "GWSA");
    let info = godwit_site::SubstrateInfo {
        id: want.id,
        name: want.name,
        kind: SubstrateKind::Restricted,
        owner: want.owner,
        image: name("tiny"),
        arch: godwit_types::Arch::X86_64,
        memory: Mib(128),
        vcpus: 1,
        raw_bytes: 1,
        stored_bytes: 1,
        created: UnixMs(1),
        content: godwit_types::Hash::of(b"file"),
        dock: None,
    };
    let verdict = serde_json::to_vec(&Ok::<_, Fault>(info)).expect("json");
    site.write_all(&verdict).await.expect("written");
    drop(site);
    let begun = std::time::Instant::now();
    while !w.c.registry().substrate_named(&name("acme"), &name("file")) {
        assert!(begun.elapsed() < Duration::from_secs(30), "it is not listed");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What is logged, at every level.
#[derive(Clone, Default)]
struct Log(Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("lock").extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn what_is_typed_is_written_down_nowhere() {
    const TYPED: &str = "my-passphrase-7345";
    let log = Log::default();
    let writer = log.clone();
    let seen = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    let _logged = tracing::subscriber::set_default(seen);
    let w = world(Send::Works).await;
    let r = router(&w);
    let has = furnish(&w, "acme", "our");
    let token = token_of(&w, Role::Member);
    let path = format!("/v1/vms/{}/type", has.vm.name);
    let body = serde_json::json!({ "text": TYPED }).to_string();
    // One that is done: it is typed at the site, and only there.
    let (status, done) = send_as(&r, Method::POST, &path, &token, &body).await;
    assert_eq!(status, StatusCode::NO_CONTENT, "{done}");
    let typed = [&w.center, &w.cafe].map(|site| site.typed.lock().expect("lock").clone()).concat();
    assert_eq!(typed, [TYPED]);
    // Those that are refused before anybody types.
    let long = serde_json::json!({ "text": TYPED.repeat(1000) }).to_string();
    let odd = serde_json::json!({ "text": TYPED, "words": TYPED }).to_string();
    let (_, too_long) = send_as(&r, Method::POST, &path, &token, &long).await;
    let (_, not_known) = send_as(&r, Method::POST, &path, &token, &odd).await;
    let nowhere = path.replace("our-vm", "none");
    let (_, none) = send_as(&r, Method::POST, &nowhere, &token, &body).await;
    let mut all = vec![done, too_long, not_known, none];
    for read in ["/v1/audit", "/v1/ops", "/v1/vms", "/metrics"] {
        let (status, text) = send_as(&r, Method::GET, read, "secret", "").await;
        assert_eq!(status, StatusCode::OK, "{read}");
        all.push(text);
    }
    assert!(all[4].contains("vm type"), "that something was typed is: {}", all[4]);
    let logged = String::from_utf8(log.0.lock().expect("lock").clone()).expect("text");
    assert!(!logged.is_empty(), "nothing is seen of the log");
    all.push(logged);
    for text in &all {
        assert!(!text.contains(TYPED), "{text}");
    }
    // Nor does the registry's file have it, once what was typed is in its log for sure.
    let file = std::fs::read(w.registry_file()).expect("the registry");
    let has = |words: &str| file.windows(words.len()).any(|part| part == words.as_bytes());
    assert!(has("vm type") && !has(TYPED));
}
