//! Exempts what leaves by our devices from source NAT: a pod's address is its identity.
//!
//! CNIs masquerade what leaves their prefix. An nft chain just before theirs (priority 99; theirs are at 100) maps the
//! source to itself. That settles the flow's source for every later NAT chain of the kernel, whoever made it: nft, or
//! iptables in either backend (all of them are consulted in order of priority until one has settled it). What
//! kube-proxy marked for masquerade is left to it.

use nftables::helper::{self, NftablesError};
use serde_json::{Value, json};

use crate::names;

/// nft refused, or is not there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// See the text.
    #[error("{action}: {reason} (without this table the CNI may masquerade pods' addresses on their way to other pools)")]
    Nft {
        /// What was tried.
        action: &'static str,
        /// What nft said.
        reason: String,
    },
}

fn failed(action: &'static str) -> impl Fn(NftablesError) -> Error {
    move |e| Error::Nft { action, reason: e.to_string() }
}

/// Sees to it that the table is there; true if it had to be made.
pub async fn ensure() -> Result<bool, Error> {
    if exists().await {
        return Ok(false);
    }
    apply("make nft table inet raven", &ruleset()).await?;
    Ok(true)
}

/// Removes the table; true if it was there.
pub async fn remove() -> Result<bool, Error> {
    if !exists().await {
        return Ok(false);
    }
    apply("remove nft table inet raven", &json!({ "nftables": [{ "delete": { "table": table() } }] })).await?;
    Ok(true)
}

async fn exists() -> bool {
    let args = ["list", "chain", "inet", names::NFT_TABLE, "postrouting"];
    let listed = helper::get_current_ruleset_raw_async(helper::DEFAULT_NFT, args).await;
    // Somebody may have flushed the chain and left it in place: it must have its two rules.
    listed.is_ok_and(|text| text.matches("\"snat\"").count() == 2)
}

async fn apply(action: &'static str, ruleset: &Value) -> Result<(), Error> {
    helper::apply_ruleset_raw_async(&ruleset.to_string(), helper::DEFAULT_NFT, helper::DEFAULT_ARGS).await.map(drop).map_err(failed(action))
}

fn table() -> Value {
    json!({ "family": "inet", "name": names::NFT_TABLE })
}

/// One transaction: the table is taken away and made anew.
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
