//! The API beside the command line of an earlier release, by what that release's API took and gave
//! (`recorded/`): whatever that command line sends is still taken, and whatever it reads is still
//! there, of the same type.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{REVISION_HEADER, TENANT_HEADER};

/// What the API of earlier releases was, by the protocol that they spoke.
const RECORDED: [(u16, &str); 1] = [(3, include_str!("recorded/api-3.json"))];

/// Which way a value goes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    /// From the command line: this API takes all that the earlier one took.
    Sent,
    /// To the command line: this API gives nothing that the earlier one could not have given, but for
    /// fields that are new.
    Received,
}

/// Two descriptions of an API, and what the newer one breaks.
struct Compared<'a> {
    old: &'a Value,
    new: &'a Value,
    /// What was compared already: which way it goes, and its names then and now.
    seen: BTreeSet<(Way, String, Option<String>)>,
    broken: Vec<String>,
}

/// The words in an array.
fn words(of: &Value) -> BTreeSet<String> {
    let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    match of {
        Value::Null => BTreeSet::new(),
        Value::Array(all) => all.iter().map(text).collect(),
        one => BTreeSet::from([text(one)]),
    }
}

impl<'a> Compared<'a> {
    /// What `new` breaks of `old`.
    fn of(old: &'a Value, new: &'a Value) -> Vec<String> {
        let mut me = Self { old, new, seen: BTreeSet::new(), broken: Vec::new() };
        for (path, methods) in old["paths"].as_object().expect("paths") {
            for (method, old) in methods.as_object().expect("methods") {
                let at = format!("{method} {path}");
                match new["paths"][path].get(method) {
                    Some(new) => me.call(&at, old, new),
                    None => me.is_broken(&at, "is not there any more"),
                }
            }
        }
        // What crosses without being named by a path: events, parts of results.
        for (name, old) in old["components"]["schemas"].as_object().expect("schemas") {
            let unseen = |way| !me.seen.iter().any(|(seen, old, _)| (seen, old) == (&way, name));
            if unseen(Way::Sent) && unseen(Way::Received) {
                me.value(Way::Received, name, old, &new["components"]["schemas"][name]);
            }
        }
        me.broken
    }

    fn is_broken(&mut self, at: &str, why: impl std::fmt::Display) {
        self.broken.push(format!("{at} {why}"));
    }

    fn call(&mut self, at: &str, old: &Value, new: &Value) {
        let named = |call: &Value| -> Vec<(String, Value)> {
            let all = call["parameters"].as_array().into_iter().flatten();
            all.map(|p| (format!("{} {}", p["in"], p["name"]), p.clone())).collect()
        };
        let (had, has) = (named(old), named(new));
        for (name, parameter) in &had {
            let at = format!("{at}, {name}");
            match has.iter().find(|(other, _)| other == name) {
                Some((_, now)) => self.value(Way::Sent, &at, &parameter["schema"], &now["schema"]),
                None => self.is_broken(&at, "is not taken any more"),
            }
        }
        for (name, parameter) in &has {
            let asked = had.iter().any(|(other, was)| other == name && was["required"] == true);
            if parameter["required"] == true && !asked {
                self.is_broken(at, format!("wants {name}"));
            }
        }
        let body = |call: &Value| call["requestBody"]["content"].clone();
        self.content(Way::Sent, &format!("{at}, body"), &body(old), &body(new));
        if body(old).is_null() && new["requestBody"]["required"] == true {
            self.is_broken(at, "wants a body");
        }
        for (status, old) in old["responses"].as_object().expect("responses") {
            let at = format!("{at}, {status}");
            match new["responses"].get(status) {
                Some(new) => self.content(Way::Received, &at, &old["content"], &new["content"]),
                None => self.is_broken(&at, "is not answered any more"),
            }
        }
    }

    fn content(&mut self, way: Way, at: &str, old: &Value, new: &Value) {
        for (kind, old) in old.as_object().into_iter().flatten() {
            match new.get(kind) {
                Some(new) => self.value(way, at, &old["schema"], &new["schema"]),
                None => self.is_broken(at, format!("is {kind} no more")),
            }
        }
    }

    /// `bigger` is the side that may have more: who takes, or who was prepared for it.
    fn among(&mut self, way: Way, at: &str, old: &BTreeSet<String>, new: &BTreeSet<String>) {
        let (smaller, bigger) = if way == Way::Sent { (old, new) } else { (new, old) };
        // One that names nothing allows everything.
        if !bigger.is_empty() && (smaller.is_empty() || !smaller.is_subset(bigger)) {
            self.is_broken(at, format!("was one of {old:?} and is one of {new:?}"));
        }
    }

    fn value(&mut self, way: Way, at: &str, old: &Value, new: &Value) {
        let name =
            |v: &Value| v["$ref"].as_str().map(|r| r.rsplit('/').next().unwrap_or(r).to_owned());
        if let Some(old) = name(old)
            && !self.seen.insert((way, old, name(new)))
        {
            return;
        }
        let within = |doc: &'a Value, v: &Value| match name(v) {
            Some(name) => doc["components"]["schemas"][&name].clone(),
            None => v.clone(),
        };
        let (old, new) = (within(self.old, old), within(self.new, new));
        for what in ["type", "enum"] {
            self.among(way, &format!("{at}, its {what}"), &words(&old[what]), &words(&new[what]));
        }
        for what in ["format", "pattern", "minimum", "maximum"] {
            if old[what] != new[what] {
                self.is_broken(at, format!("had {what} {} and has {}", old[what], new[what]));
            }
        }
        let fields = |of: &Value| of["properties"].as_object().cloned().unwrap_or_default();
        for (field, old) in fields(&old) {
            let at = format!("{at}.{field}");
            match new["properties"].get(&field) {
                Some(new) => self.value(way, &at, &old, new),
                None => self.is_broken(&at, "is not there any more"),
            }
        }
        let (had, has) = (words(&old["required"]), words(&new["required"]));
        let (wanted, there) = if way == Way::Sent { (has, had) } else { (had, has) };
        for field in wanted.difference(&there) {
            let why = if way == Way::Sent { "is wanted now" } else { "may be missing now" };
            self.is_broken(&format!("{at}.{field}"), why);
        }
        for part in ["items", "additionalProperties", "propertyNames"] {
            if old[part].is_object() {
                self.value(way, &format!("{at}[]"), &old[part], &new[part]);
            }
        }
        for of in ["oneOf", "allOf", "anyOf"] {
            let variants = |v: &Value| v[of].as_array().cloned().unwrap_or_default();
            let (old, new) = (variants(&old), variants(&new));
            let (smaller, bigger) = if way == Way::Sent { (&old, &new) } else { (&new, &old) };
            if smaller.len() > bigger.len() {
                self.is_broken(at, format!("had {} variants and has {}", old.len(), new.len()));
            }
            for (n, (old, new)) in old.iter().zip(&new).enumerate() {
                self.value(way, &format!("{at}, variant {n}"), old, new);
            }
        }
    }
}

fn remove(from: &mut Value, key: &str) {
    assert!(from.as_object_mut().expect("an object").remove(key).is_some(), "{key}");
}

fn now() -> Value {
    serde_json::to_value(super::openapi()).expect("a description")
}

#[test]
fn the_command_line_of_an_earlier_release_is_served_as_it_was() {
    for (protocol, text) in RECORDED {
        let old: Value = serde_json::from_str(text).expect("a description");
        let broken = Compared::of(&old, &now());
        assert!(broken.is_empty(), "for those of protocol {protocol}:\n{}", broken.join("\n"));
    }
    assert_eq!((TENANT_HEADER, REVISION_HEADER), ("godwit-tenant", "godwit-revision"));
}

#[test]
fn what_would_break_an_earlier_command_line_is_found() {
    type Change = fn(&mut Value);
    const SCHEMAS: &str = "/components/schemas";
    let breaks: [(&str, Change, &str); 10] = [
        ("/paths", |v| remove(v, "/v1/vms"), "is not there any more"),
        ("/paths/~1v1~1vms/get", |v| v["parameters"] = Value::Null, "is not taken any more"),
        ("/paths/~1v1~1vms/get/parameters/0", |v| v["required"] = true.into(), "wants"),
        ("/paths/~1v1~1vms/post/responses", |v| remove(v, "202"), "is not answered"),
        ("CreateVm", |v| v["required"] = serde_json::json!(["name"]), "is wanted now"),
        ("VmRecord", |v| v["required"] = serde_json::json!(["id"]), "may be missing now"),
        ("VmRecord/properties", |v| remove(v, "name"), "is not there any more"),
        // Of a type that other fields still have.
        (
            "VmRecord/properties",
            |v| v["name"] = serde_json::json!({"type": "integer"}),
            "is one of",
        ),
        ("VmState", |v| v["enum"] = serde_json::json!(["asleep", "running"]), "is one of"),
        ("Mib", |v| v["type"] = "string".into(), "is one of"),
    ];
    for (at, change, why) in breaks {
        let mut changed = now();
        let at = if at.starts_with('/') { at.to_owned() } else { format!("{SCHEMAS}/{at}") };
        change(changed.pointer_mut(&at).unwrap_or_else(|| panic!("no {at}")));
        let broken = Compared::of(&now(), &changed);
        assert!(broken.iter().any(|b| b.contains(why)), "{at}: {broken:?}");
    }
    // Fields and paths that are new break nothing.
    let mut changed = now();
    changed["components"]["schemas"]["VmRecord"]["properties"]["colour"] =
        serde_json::json!({"type": "string"});
    changed["paths"]["/v1/colours"] = changed["paths"]["/v1/vms"].clone();
    assert_eq!(Compared::of(&now(), &changed), Vec::<String>::new());
}
