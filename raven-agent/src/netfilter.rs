//! Raven's nft table: the source addresses of packets that leave by Raven's devices, and what keeps pods out of the overlay
//! ([`guard`]).
//!
//! Two NAT chains stand before those of CNIs and kube-proxy (priorities 98 and 99; theirs have 100). The kernel consults
//! NAT chains in the order of their priority until one sets the source. Packets that kube-proxy marked for masquerade are
//! left to kube-proxy.
//!
//! - A pod's address is its identity. CNIs masquerade packets that leave their prefix, so chain `postrouting` maps the
//!   source to itself, which exempts the flow from every later chain: of nft and of iptables with either backend.
//! - A process on the node may send from another of the node's addresses: one that it is bound to, or the uplink's, which
//!   the kernel chose for a ClusterIP before kube-proxy replaced the destination. No answer could be routed to
//!   it, so chain `hosts` masquerades it with the device's address, which is inside the node's prefix.

mod guard;
mod watch;

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use serde_json::{Value, json};

use self::guard::Guard;
pub use self::watch::deletions;
use crate::{names, nft, state::Change};

/// nft failed, or is not installed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} nft table inet {}: {reason}; {consequence}", names::NFT_TABLE)]
pub struct Error {
    action: &'static str,
    reason: nft::Error,
    consequence: &'static str,
}

/// What the rules depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    own: BTreeSet<IpNet>,
    mark: u32,
    guard: Guard,
}

/// What was ensured of the table. Each part has a transaction of its own, because the last two need kernel modules that
/// some kernels lack.
pub struct Ensured {
    /// Pods keep their addresses.
    pub pods: Result<Change, Error>,
    /// Processes of the node get an address of its prefix.
    pub hosts: Result<Change, Error>,
    /// Pods cannot send overlay packets.
    pub guard: Result<Change, Error>,
}

/// Parts of the table that this kernel cannot have.
#[derive(Clone, Copy, Debug, Default)]
pub struct Without {
    /// The chain for processes of the node.
    pub hosts: bool,
    /// The chains that keep pods out of the overlay.
    pub guard: bool,
}

/// A chain of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chain {
    /// Keeps the addresses of pods.
    Postrouting,
    /// Masquerades the node's addresses outside its prefixes.
    Hosts,
}

// === impl Sources ===

impl Sources {
    /// `own`: the prefixes of this node, whose addresses are kept. `mark`: the bits of kube-proxy's mark. `outer`: this
    /// node's source of overlay packets.
    pub fn new(own: &[IpNet], mark: u32, outer: IpAddr) -> Self {
        // nft refuses sets with overlapping prefixes.
        let own = IpNet::aggregate(&own.to_vec()).into_iter().collect();
        Self { own, mark, guard: Guard { own: outer } }
    }

    /// Ensures that the table exists with its rules.
    pub async fn ensure(&self, without: Without) -> Ensured {
        // Another program may have changed any part of the table.
        let have = match nft::list(&["list", "table", "inet", names::NFT_TABLE]).await {
            Ok(have) => have,
            // One that does not exist cannot be listed.
            Err(nft::Error::Refused { .. }) => Value::default(),
            // What is not known is not replaced: a replacement causes the next run.
            Err(reason) => {
                let consequence = "if its rules are missing, pods lose their source addresses";
                let pods = Err(Error { action: "read", reason, consequence });
                return Ensured { pods, hosts: Ok(Change::NONE), guard: Ok(Change::NONE) };
            }
        };
        let pods = self.ensure_chain(Chain::Postrouting, &have).await;
        let hosts = if without.hosts { Ok(Change::NONE) } else { self.ensure_chain(Chain::Hosts, &have).await };
        let guard = if without.guard { Ok(Change::NONE) } else { self.guard.ensure(&have).await };
        let failed = |reason| Error {
            action: "create",
            reason,
            consequence: "without chains spoofed and masqueraded, a pod can send overlay packets with forged sources; they need \
                          the kernel modules nft_fib_ipv4, nft_fib_inet and nft_ct",
        };
        Ensured { pods, hosts, guard: guard.map_err(failed) }
    }

    async fn ensure_chain(&self, chain: Chain, have: &Value) -> Result<Change, Error> {
        if self.has(chain, have) {
            return Ok(Change::NONE);
        }
        let failed = |reason| Error { action: "create", reason, consequence: chain.consequence() };
        nft::apply(&self.ruleset(chain)).await.map_err(failed)?;
        Ok(Change::ONE)
    }

    /// True if the listed table has the chain with its rules.
    fn has(&self, chain: Chain, listed: &Value) -> bool {
        let listed = |kind: &'static str| nft::objects(listed, kind);
        let rules: Vec<&Value> = listed("rule").filter(|rule| rule["chain"] == chain.name()).collect();
        let verdict = if chain == Chain::Hosts { "masquerade" } else { "snat" };
        let is_ours = |rule: &&Value| {
            let statements = rule["expr"].as_array().map(Vec::as_slice).unwrap_or_default();
            let marked = json!([{ "meta": { "key": "mark" } }, self.mark]);
            statements.iter().any(|s| s["match"]["left"]["&"] == marked)
                && statements.iter().any(|s| s.get(verdict).is_some())
        };
        let sets: BTreeSet<IpNet> =
            listed("set").flat_map(|set| set["elem"].as_array().into_iter().flatten()).filter_map(as_prefix).collect();
        listed("chain").any(|c| c["name"] == chain.name() && c["hook"] == "postrouting")
            && rules.iter().all(is_ours)
            && rules.len() == self.rules(chain).len()
            && (chain == Chain::Postrouting || sets == self.own)
    }

    /// One transaction that creates the chain, or replaces its rules.
    fn ruleset(&self, chain: Chain) -> Value {
        let object = |name: &str| json!({ "family": "inet", "table": names::NFT_TABLE, "name": name });
        let mut commands = empty_chain(chain.name(), "nat", "postrouting", chain.priority()).to_vec();
        for family in FAMILIES.into_iter().filter(|_| chain == Chain::Hosts) {
            let elements: Vec<Value> = self.of(family).map(from_prefix).collect();
            commands.push(json!({ "add": { "set": { "family": "inet", "table": names::NFT_TABLE, "name": family.set,
                                  "type": family.address, "flags": ["interval"] } } }));
            commands.push(json!({ "flush": { "set": object(family.set) } }));
            if !elements.is_empty() {
                commands.push(json!({ "add": { "element": { "family": "inet", "table": names::NFT_TABLE,
                                      "name": family.set, "elem": elements } } }));
            }
        }
        commands.extend(self.rules(chain).iter().map(|statements| add_rule(chain.name(), statements)));
        json!({ "nftables": commands })
    }

    /// The statements of each rule.
    fn rules(&self, chain: Chain) -> Vec<Value> {
        let rule = |family: Family| {
            let mut statements = vec![
                json!({ "match": { "op": "==", "left": { "meta": { "key": "oifname" } },
                                   "right": { "set": [names::OVERLAY, names::TUNNEL] } } }),
                json!({ "match": { "op": "==", "left": { "&": [{ "meta": { "key": "mark" } }, self.mark] }, "right": 0 } }),
                json!({ "match": { "op": "==", "left": { "meta": { "key": "nfproto" } }, "right": family.protocol } }),
            ];
            let source = json!({ "payload": { "protocol": family.name, "field": "saddr" } });
            match chain {
                Chain::Postrouting => statements.push(json!({ "snat": { "family": family.name, "addr": source } })),
                Chain::Hosts => statements.extend([
                    json!({ "match": { "op": "!=", "left": source, "right": format!("@{}", family.set) } }),
                    json!({ "match": { "op": "==", "left": { "fib": { "result": "type", "flags": ["saddr"] } },
                                       "right": "local" } }),
                    json!({ "masquerade": null }),
                ]),
            }
            Value::from(statements)
        };
        // Without a prefix the device has no address to masquerade with.
        let has_address = |family: &Family| chain == Chain::Postrouting || self.of(*family).next().is_some();
        FAMILIES.into_iter().filter(has_address).map(rule).collect()
    }

    fn of(&self, family: Family) -> impl Iterator<Item = &IpNet> {
        self.own.iter().filter(move |prefix| prefix.addr().is_ipv4() == (family.name == "ip"))
    }
}

// === impl Chain ===

impl Chain {
    fn name(self) -> &'static str {
        match self {
            Self::Postrouting => "postrouting",
            Self::Hosts => "hosts",
        }
    }

    fn priority(self) -> i32 {
        match self {
            Self::Postrouting => 99,
            Self::Hosts => 98,
        }
    }

    fn consequence(self) -> &'static str {
        match self {
            Self::Postrouting => "without this table the CNI may masquerade pods' addresses towards other pools",
            Self::Hosts => {
                "without chain hosts, processes of this node that send from its own address do not reach other pools; \
                 it needs the kernel modules nft_fib_ipv4, nft_fib_ipv6, nft_fib_inet and nft_masq"
            }
        }
    }
}

/// The names of an address family in nft.
#[derive(Clone, Copy)]
struct Family {
    name: &'static str,
    protocol: &'static str,
    address: &'static str,
    set: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family { name: "ip", protocol: "ipv4", address: "ipv4_addr", set: "own4" },
    Family { name: "ip6", protocol: "ipv6", address: "ipv6_addr", set: "own6" },
];

fn from_prefix(prefix: &IpNet) -> Value {
    json!({ "prefix": { "addr": prefix.addr(), "len": prefix.prefix_len() } })
}

/// An element of a set as nft lists it: an address, or a prefix.
fn as_prefix(element: &Value) -> Option<IpNet> {
    match element.as_str() {
        Some(address) => Some(IpNet::from(address.parse::<std::net::IpAddr>().ok()?)),
        None => nft::prefix(element),
    }
}

/// Commands after which the table has a chain without rules.
fn empty_chain(name: &str, kind: &str, hook: &str, priority: i32) -> [Value; 3] {
    [
        json!({ "add": { "table": { "family": "inet", "name": names::NFT_TABLE } } }),
        json!({ "add": { "chain": { "family": "inet", "table": names::NFT_TABLE, "name": name,
                                    "type": kind, "hook": hook, "prio": priority, "policy": "accept" } } }),
        json!({ "flush": { "chain": { "family": "inet", "table": names::NFT_TABLE, "name": name } } }),
    ]
}

/// The command that adds a rule to a chain of the table.
fn add_rule(chain: &str, statements: &Value) -> Value {
    json!({ "add": { "rule": { "family": "inet", "table": names::NFT_TABLE, "chain": chain, "expr": statements } } })
}

/// Deletes the table, if it exists.
pub async fn remove() -> Result<Change, Error> {
    if nft::list(&["list", "table", "inet", names::NFT_TABLE]).await.is_err() {
        return Ok(Change::NONE);
    }
    let delete = json!({ "nftables": [{ "delete": { "table": { "family": "inet", "name": names::NFT_TABLE } } }] });
    let failed =
        |reason| Error { action: "delete", reason, consequence: "delete it with `nft delete table inet raven`" };
    nft::apply(&delete).await.map_err(failed)?;
    Ok(Change::ONE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(own: &[&str]) -> Sources {
        let own: Vec<IpNet> = own.iter().map(|p| p.parse().expect("a prefix")).collect();
        Sources::new(&own, 0x4000, [10, 1, 0, 1].into())
    }

    /// The table as nft lists it after the ruleset of both chains.
    fn listed(sources: &Sources) -> Value {
        let mut objects = Vec::new();
        for chain in [Chain::Postrouting, Chain::Hosts] {
            let ruleset = sources.ruleset(chain);
            for command in ruleset["nftables"].as_array().expect("a list") {
                match &command["add"] {
                    Value::Object(added) if added.contains_key("element") => {
                        objects.push(json!({ "set": added["element"] }));
                    }
                    Value::Object(added) => objects.push(Value::Object(added.clone())),
                    _ => {}
                }
            }
        }
        json!({ "nftables": objects })
    }

    #[test]
    fn chains_are_replaced_if_their_prefixes_mark_or_rules_differ() {
        let ours = sources(&["10.1.0.0/24", "10.1.0.128/25", "192.168.0.2/32", "fd00:1::/64"]);
        let complete = listed(&ours);
        assert!(ours.has(Chain::Postrouting, &complete) && ours.has(Chain::Hosts, &complete));
        let other = sources(&["10.1.0.0/24"]);
        assert!(other.has(Chain::Postrouting, &complete) && !other.has(Chain::Hosts, &complete), "other prefixes");
        let marked = Sources { mark: 0x8000, ..ours.clone() };
        assert!(!marked.has(Chain::Postrouting, &complete) && !marked.has(Chain::Hosts, &complete), "another mark");
        let mut flushed = complete.clone();
        flushed["nftables"].as_array_mut().expect("a list").retain(|object| object.get("rule").is_none());
        assert!(!ours.has(Chain::Postrouting, &flushed) && !ours.has(Chain::Hosts, &flushed), "no rules");
        assert!(!ours.has(Chain::Postrouting, &Value::Null), "no table");
    }

    #[test]
    fn family_without_prefix_is_not_masqueraded() {
        assert_eq!(sources(&["10.1.0.0/24"]).rules(Chain::Hosts).len(), 1);
        assert_eq!(sources(&[]).rules(Chain::Hosts).len(), 0);
        assert_eq!(sources(&[]).rules(Chain::Postrouting).len(), 2);
    }
}
