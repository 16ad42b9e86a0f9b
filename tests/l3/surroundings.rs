//! Bad surroundings get one clear message each, where a person looks first; good neighbours are left alone.

use std::time::Duration;

use anyhow::{Context, ensure};
use kube::Api;
use raven_api::GatewayNode;
use raven_tests::{eventually, privileged};

use crate::Running;

const SOON: Duration = Duration::from_secs(45);

impl Running {
    /// Waits until the GatewayNode of x-a says something, or nothing any more.
    pub(crate) async fn says(&self, what: &str, wanted: impl Fn(&str, &str) -> bool) {
        let api: Api<GatewayNode> = Api::all(self.lab.cluster().client());
        let seen = eventually(SOON, what, || async {
            let status = api.get("x-a").await?.status.context("a status")?;
            let ready = status.conditions.iter().find(|c| c.type_ == "Ready").context("a Ready condition")?;
            ensure!(wanted(&ready.status, &ready.message), "it says {} {}: {}", ready.status, ready.reason, ready.message);
            Ok(())
        });
        self.check(seen.await);
    }

    fn on(&self, node: &str, script: &str) -> String {
        self.check(self.lab.node(node).ns.sh(script))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stops_packets_is_named_with_the_remedy_and_forgotten_when_it_is_gone() {
    if !privileged("what_stops_packets_is_named_with_the_remedy_and_forgotten_when_it_is_gone") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    running.says("all is well", |status, _| status == "True").await;

    running.on("x-a", "iptables -P FORWARD DROP");
    running
        .says("the FORWARD policy is named", |s, m| s == "False" && m.contains("FORWARD") && m.contains("iptables -I FORWARD -i raven0"))
        .await;
    running.on("x-a", "iptables -P FORWARD ACCEPT");
    running.says("all is well again", |status, _| status == "True").await;

    running.on("x-a", "ip route add 10.244.1.0/24 dev cni0 table 77; ip rule add pref 50 lookup 77");
    running.says("the route that wins is named", |s, m| s == "False" && m.contains("cni0") && m.contains("10.244.1.0/24")).await;
    running.on("x-a", "ip rule del pref 50");
    running.says("all is well again", |status, _| status == "True").await;

    running.on("x-a", "sysctl -qw net.ipv4.ip_forward=0");
    running.says("forwarding is named", |s, m| s == "False" && m.contains("net.ipv4.ip_forward=1")).await;
}
