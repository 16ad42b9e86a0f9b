//! Keeps pods out of the overlay. A gateway node accepts an overlay packet by its outer source, which must be a node of the
//! pool, so no pod may send UDP to the overlay's port with a node's address: neither because its CNI masquerades it, nor
//! because it writes that address itself.
//!
//! The fast tier receives packets before netfilter; but it receives only those that arrive at the uplink, and pods'
//! packets leave there.

use std::net::IpAddr;

use raven_common::OVERLAY_PORT;
use serde_json::{Value, json};

use super::{add_rule, empty_chain};
use crate::{nft, state::Change};

/// What the rules depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Guard {
    /// This node's outer address.
    pub(super) own: IpAddr,
}

/// A chain with its one rule.
struct Chain {
    name: &'static str,
    hook: &'static str,
    priority: i32,
    rule: Value,
}

impl Guard {
    /// Ensures the chains. `have`: the table as nft lists it.
    pub(super) async fn ensure(self, have: &Value) -> Result<Change, nft::Error> {
        let chains = self.chains();
        if chains.iter().all(|chain| chain.is_in(have)) {
            return Ok(Change::NONE);
        }
        nft::apply(&json!({ "nftables": chains.iter().flat_map(Chain::commands).collect::<Vec<_>>() })).await?;
        Ok(Change::ONE)
    }

    fn chains(self) -> [Chain; 2] {
        let (family, source) = if self.own.is_ipv4() { ("ipv4", "ip saddr") } else { ("ipv6", "ip6 saddr") };
        let rule = |conditions: Vec<Value>| {
            let overlay = [
                json!({ "match": { "op": "==", "left": { "meta": { "key": "nfproto" } }, "right": family } }),
                json!({ "match": { "op": "==", "left": { "payload": { "protocol": "udp", "field": "dport" } },
                                   "right": OVERLAY_PORT } }),
            ];
            let verdict = [json!({ "counter": null }), json!({ "drop": null })];
            overlay.into_iter().chain(conditions).chain(verdict).collect()
        };
        [
            // The route to the source does not lead to the device that the packet came from.
            Chain {
                name: "spoofed",
                hook: "prerouting",
                priority: -300,
                rule: rule(vec![json!({ "match": { "op": "==", "right": false,
                    "left": { "fib": { "result": "oif", "flags": ["saddr", "iif"] } } } })]),
            },
            // After all chains that masquerade. A node's own packets may get another port there.
            Chain {
                name: "masqueraded",
                hook: "postrouting",
                priority: 150,
                rule: rule(vec![
                    json!({ "match": { "op": "in", "left": { "ct": { "key": "status" } }, "right": "snat" } }),
                    json!({ "match": { "op": "!=", "right": self.own,
                                       "left": { "ct": { "key": source, "dir": "original" } } } }),
                ]),
            },
        ]
    }
}

impl Chain {
    fn is_in(&self, listed: &Value) -> bool {
        let has_chain = nft::objects(listed, "chain").any(|c| c["name"] == self.name && c["hook"] == self.hook);
        let rules: Vec<Value> = nft::objects(listed, "rule")
            .filter(|rule| rule["chain"] == self.name)
            .map(|rule| without_counter(&rule["expr"]))
            .collect();
        has_chain && rules == [without_counter(&self.rule)]
    }

    fn commands(&self) -> Vec<Value> {
        let chain = empty_chain(self.name, "filter", self.hook, self.priority);
        chain.into_iter().chain([add_rule(self.name, &self.rule)]).collect()
    }
}

/// Statements without the counter, which lists what it has counted.
fn without_counter(statements: &Value) -> Value {
    let statements = statements.as_array().into_iter().flatten();
    statements.filter(|statement| statement.get("counter").is_none()).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_are_replaced_if_a_rule_differs() {
        let guard = Guard { own: [10, 0, 0, 1].into() };
        let listed = |guard: Guard| {
            let mut objects = Vec::new();
            for chain in guard.chains() {
                let added =
                    chain.commands().into_iter().filter_map(|mut command| command.get_mut("add").map(Value::take));
                objects.extend(added);
                let rule = objects.last_mut().expect("a rule");
                for statement in rule["rule"]["expr"].as_array_mut().expect("statements") {
                    if statement.get("counter").is_some() {
                        *statement = json!({ "counter": { "packets": 7, "bytes": 700 } });
                    }
                }
            }
            json!({ "nftables": objects })
        };
        let is_complete = |listed: &Value| guard.chains().iter().all(|chain| chain.is_in(listed));
        let mut complete = listed(guard);
        assert!(is_complete(&complete));
        assert!(!is_complete(&listed(Guard { own: [10, 0, 0, 2].into() })), "another address");
        assert!(!is_complete(&Value::Null), "no table");
        complete["nftables"].as_array_mut().expect("a list").retain(|object| object.get("rule").is_none());
        assert!(!is_complete(&complete), "no rules");
    }
}
