//! Counts what the L3 tunnel and the L7 proxy of a site cost on its link to the internet.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::Namespace;

/// Bytes of an Ethernet header, which nftables does not count.
const ETHERNET: u64 = 14;

/// Counts packets that match.
pub struct Meter {
    at: Namespace,
    name: String,
}

/// A rule's counter, as `nft -j` prints it.
#[derive(serde::Deserialize)]
struct Counter {
    packets: u64,
    bytes: u64,
}

impl Meter {
    /// Starts to count what passes a netfilter hook and matches one of these expressions of nftables, each packet once.
    /// `name`: of its table.
    pub fn start(at: &Namespace, name: &str, hook: &str, matches: &[&str]) -> Result<Self> {
        let rules = matches.iter().map(|what| format!("{what} counter accept; ")).collect::<String>();
        at.nft(&format!("table inet {name} {{ chain {hook} {{ type filter hook {hook} priority -300; {rules} }}; }}"))?;
        Ok(Self { at: at.clone(), name: name.to_owned() })
    }

    /// Counts what a site's router forwards from and to a port.
    pub fn of_port(router: &Namespace, port: u16) -> Result<Self> {
        let matches = ["dport", "sport"].map(|end| format!("meta l4proto {{ tcp, udp }} th {end} {port}"));
        Self::start(router, &format!("meter{port}"), "forward", &matches.each_ref().map(String::as_str))
    }

    /// Bytes on Ethernet so far.
    pub fn bytes(&self) -> Result<u64> {
        let listed: serde_json::Value =
            serde_json::from_str(&self.at.run("nft", &["-j", "list", "table", "inet", &self.name])?)?;
        let items = listed["nftables"].as_array().context("nft lists no objects")?;
        let counters = items.iter().filter_map(|item| item["rule"]["expr"].as_array()).flatten();
        let counters: Vec<Counter> = counters
            .filter_map(|expression| expression.get("counter"))
            .map(|counter| serde_json::from_value(counter.clone()))
            .collect::<Result<_, _>>()?;
        anyhow::ensure!(!counters.is_empty(), "table {} has no counter", self.name);
        Ok(counters.iter().map(|counter| counter.bytes + ETHERNET * counter.packets).sum())
    }

    /// Counts for a time, and returns the bytes of a month of 30 days at this rate.
    pub async fn month(&self, window: Duration) -> Result<f64> {
        let (before, begin) = (self.bytes()?, Instant::now());
        tokio::time::sleep(window).await;
        let bytes = self.bytes()? - before;
        Ok(bytes as f64 / begin.elapsed().as_secs_f64() * 86_400.0 * 30.0)
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        // The namespace may be gone already.
        let _ = self.at.sh(&format!("nft delete table inet {}", self.name));
    }
}
