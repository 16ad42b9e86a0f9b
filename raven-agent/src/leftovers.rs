//! What OpenYurt's Raven leaves on a node when it is killed or replaced: rules, a routing table, chains and ipsets. Its two
//! devices have the same names as Raven's, whose drivers take them over.
//!
//! Nothing here stops packets, because Raven's rule and table precede them. They are named once per start, and removed
//! by `--adopt`, after Raven's own rule exists: until then, they may be all that keeps packets off the default route.

use std::{io, path::Path};

use netlink_packet_netfilter::{NetfilterMessageInner, NetfilterProtoFamily, NetfilterSubsystem};
use rtnetlink::packet_core::DefaultNla;
use serde_json::{Value, json};

use crate::{
    link::Links,
    nfnetlink::Nfnetlink,
    nft::{self, objects, text},
    state::Change,
};

/// Names of its chains, in tables mangle and nat.
const CHAINS: [&str; 2] = ["RAVEN-MARK-CHAIN", "RAVEN-POSTROUTING"];
/// Names of its ipsets, which rules in these chains refer to.
const IPSETS: [&str; 2] = ["raven-mark-set", "raven-skip-nat-set"];

/// Logs the names of the objects that exist, or removes them.
pub async fn report_or_remove(links: &Links, remove: bool) {
    let (mut found, mut failed) = (Vec::new(), Vec::new());
    let mut note = |what: &str, result: Result<Change, String>| match result {
        Ok(change) if change.any() => found.push(what.to_owned()),
        Ok(_) => {}
        Err(e) => failed.push(format!("{what}: {e}")),
    };
    note(
        "rules 100 (fwmark 0x40) and 101, routing table 9028",
        links.upstream_rules(remove).await.map_err(|e| e.to_string()),
    );
    match nft::list(&["list", "chains"]).await {
        Ok(listed) => {
            for chain in upstream_chains(&listed) {
                let (family, table, name) = (text(chain, "family"), text(chain, "table"), text(chain, "name"));
                let removed = if remove { remove_chain(&listed, chain).await } else { Ok(()) };
                note(
                    &format!("chain {name} of {family} table {table}"),
                    removed.map(|()| Change::ONE).map_err(|e| e.to_string()),
                );
            }
        }
        Err(e) => note("chains", Err(e.to_string())),
    }
    for name in IPSETS {
        note(&format!("ipset {name}"), ipset(name, remove).await.map_err(|e| e.to_string()));
    }
    if !found.is_empty() && remove {
        tracing::info!(removed = found.join(", "), "removed what OpenYurt's Raven left on this node");
    } else if !found.is_empty() {
        tracing::warn!(
            found = found.join(", "),
            "OpenYurt's Raven left objects on this node; the agent's flag --adopt removes them"
        );
    }
    if !failed.is_empty() {
        tracing::warn!(
            failed = failed.join(", "),
            "cannot check or remove what OpenYurt's Raven left on this node; rules of iptables-legacy must be removed by \
             iptables-legacy"
        );
    }
}

fn upstream_chains(listed: &Value) -> impl Iterator<Item = &Value> {
    objects(listed, "chain").filter(|chain| CHAINS.contains(&text(chain, "name")))
}

/// Removes a chain, after the jumps to it from the table's base chains.
async fn remove_chain(listed: &Value, chain: &Value) -> Result<(), nft::Error> {
    let (family, table, name) = (text(chain, "family"), text(chain, "table"), text(chain, "name"));
    let mut commands = Vec::new();
    let base =
        objects(listed, "chain").filter(|c| c["family"] == family && c["table"] == table && c["hook"].is_string());
    for base in base {
        let rules = nft::list(&["-a", "list", "chain", family, table, text(base, "name")]).await?;
        commands.extend(jumps(&rules, name).map(|rule| {
            json!({ "delete": { "rule": { "family": family, "table": table, "chain": rule["chain"], "handle": rule["handle"] } } })
        }));
    }
    let chain = json!({ "chain": { "family": family, "table": table, "name": name } });
    commands.extend([json!({ "flush": &chain }), json!({ "delete": &chain })]);
    nft::apply(&json!({ "nftables": commands })).await
}

fn jumps<'a>(rules: &'a Value, target: &'a str) -> impl Iterator<Item = &'a Value> {
    objects(rules, "rule").filter(move |rule| {
        rule["expr"].as_array().is_some_and(|statements| statements.iter().any(|s| s["jump"]["target"] == target))
    })
}

/// Finds or destroys an ipset (linux/netfilter/ipset/ip_set.h).
async fn ipset(name: &str, destroy: bool) -> io::Result<Change> {
    const SUBSYSTEM: u8 = 6;
    const DESTROY: u8 = 3;
    const HEADER: u8 = 12;
    const PROTOCOL: u16 = 1;
    const SETNAME: u16 = 2;
    // A request would load the module.
    if !Path::new("/sys/module/ip_set").exists() {
        return Ok(Change::NONE);
    }
    let request = NetfilterMessageInner::Other {
        subsys: NetfilterSubsystem::Other(SUBSYSTEM),
        message_type: if destroy { DESTROY } else { HEADER },
        attributes: vec![
            DefaultNla::new(PROTOCOL, vec![6]),
            DefaultNla::new(SETNAME, [name.as_bytes(), b"\0"].concat()),
        ],
    };
    Change::unless_missing(Nfnetlink::connect()?.change(NetfilterProtoFamily::IPv4, request).await)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_upstreams_chains_and_the_jumps_to_them_are_found() {
        let chain = |table: &str, name: &str| json!({ "chain": { "family": "ip", "table": table, "name": name } });
        let listed = json!({ "nftables": [
            chain("mangle", "PREROUTING"), chain("mangle", "RAVEN-MARK-CHAIN"), chain("nat", "RAVEN-POSTROUTING"),
            chain("nat", "RAVEN-OTHER"),
        ] });
        let names: Vec<&str> = upstream_chains(&listed).map(|chain| text(chain, "name")).collect();
        assert_eq!(names, CHAINS);
        let rule = |handle: u8, target: &str| {
            json!({ "rule": { "family": "ip", "table": "mangle", "chain": "PREROUTING", "handle": handle,
                              "expr": [{ "counter": {} }, { "jump": { "target": target } }] } })
        };
        let rules = json!({ "nftables": [rule(4, "KUBE-PREROUTING"), rule(5, "RAVEN-MARK-CHAIN")] });
        let handles: Vec<_> = jumps(&rules, "RAVEN-MARK-CHAIN").map(|rule| rule["handle"].as_u64()).collect();
        assert_eq!(handles, [Some(5)]);
    }
}
