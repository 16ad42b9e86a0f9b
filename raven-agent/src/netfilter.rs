//! Exempts packets that leave by Raven's devices from source NAT, because a pod's address is its identity.
//!
//! CNIs masquerade packets that leave their prefix. An nft chain before theirs (priority 99; theirs have 100) maps the
//! source to itself. The kernel consults NAT chains in the order of their priority until one sets the source, so this
//! exempts the flow from every later chain: of nft and of iptables with either backend. Packets that kube-proxy marked
//! for masquerade are left to kube-proxy.

use serde_json::{Value, json};

use crate::{names, nft, state::Change};

/// nft failed, or is not installed.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot {action} nft table inet {}: {reason}; without this table the CNI may masquerade pods' addresses towards other pools",
    names::NFT_TABLE
)]
pub struct Error {
    action: &'static str,
    reason: nft::Error,
}

/// Ensures that the table exists with its rules.
pub async fn ensure() -> Result<Change, Error> {
    if exists().await {
        return Ok(Change::NONE);
    }
    apply("create", &ruleset()).await?;
    Ok(Change::ONE)
}

/// Deletes the table, if it exists.
pub async fn remove() -> Result<Change, Error> {
    if !exists().await {
        return Ok(Change::NONE);
    }
    apply("delete", &json!({ "nftables": [{ "delete": { "table": table() } }] })).await?;
    Ok(Change::ONE)
}

async fn exists() -> bool {
    let listed = nft::list(&["list", "chain", "inet", names::NFT_TABLE, "postrouting"]).await;
    // Another program may have flushed the chain, so its two rules are checked too.
    listed.is_ok_and(|chain| chain.to_string().matches("\"snat\"").count() == 2)
}

async fn apply(action: &'static str, ruleset: &Value) -> Result<(), Error> {
    nft::apply(ruleset).await.map_err(|reason| Error { action, reason })
}

fn table() -> Value {
    json!({ "family": "inet", "name": names::NFT_TABLE })
}

/// One transaction that deletes the table and creates it again.
fn ruleset() -> Value {
    let chain = json!({ "family": "inet", "table": names::NFT_TABLE, "name": "postrouting",
                        "type": "nat", "hook": "postrouting", "prio": 99, "policy": "accept" });
    json!({ "nftables": [
        { "add": { "table": table() } },
        { "delete": { "table": table() } },
        { "add": { "table": table() } },
        { "add": { "chain": chain } },
        { "add": { "rule": keep_source("ip") } },
        { "add": { "rule": keep_source("ip6") } },
    ] })
}

fn keep_source(family: &str) -> Value {
    let proto = if family == "ip" { "ipv4" } else { "ipv6" };
    json!({ "family": "inet", "table": names::NFT_TABLE, "chain": "postrouting", "expr": [
        { "match": { "op": "==", "left": { "meta": { "key": "oifname" } }, "right": { "set": [names::OVERLAY, names::TUNNEL] } } },
        { "match": { "op": "==", "left": { "&": [{ "meta": { "key": "mark" } }, names::KUBE_MASQUERADE_MARK] }, "right": 0 } },
        { "match": { "op": "==", "left": { "meta": { "key": "nfproto" } }, "right": proto } },
        { "snat": { "family": family, "addr": { "payload": { "protocol": family, "field": "saddr" } } } },
    ] })
}
