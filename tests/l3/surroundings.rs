//! Bad surroundings get one clear message each, where a person looks first; good neighbours are left alone.

use std::time::Duration;

use anyhow::{Context, ensure};
use kube::Api;
use raven_api::GatewayNode;
use raven_tests::{Lab, agent::binary, eventually, privileged, probe::Echo, proof};

use crate::Running;

/// An agent that is told of nothing new looks around again after 25 s; then its status has to be written.
const SOON: Duration = Duration::from_secs(90);

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

#[tokio::test(flavor = "multi_thread")]
async fn strict_source_checks_of_the_node_stop_nothing() {
    if !privileged("strict_source_checks_of_the_node_stop_nothing") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    for node in ["x-a", "x-b", "cloud-a", "cloud-b"] {
        // As hardened systems have it: `all`, and what devices that come later inherit.
        running.on(node, "for name in all default eth0 cni0; do sysctl -qw net.ipv4.conf.$name.rp_filter=1; done");
    }
    let (cloud, edge) = (running.lab.pool("cloud").clone(), running.lab.pool("edge-x").clone());
    running.check(proof::reach(&running.lab, &cloud, &edge, 0).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_taken_is_named_and_used_as_soon_as_it_is_free() {
    if !privileged("a_port_that_is_taken_is_named_and_used_as_soon_as_it_is_free") {
        return;
    }
    let mut running = Running::start().await.expect("the lab starts");
    let node = running.lab.node("x-a").clone();
    for (port, word) in [(4472, "raven0"), (4500, "raven-wg0")] {
        running.agent("x-a").kill().expect("the agent dies");
        running.check(running.lab.agent_command("x-a", &["cleanup", "--keep-state"]));
        // What cleanup ended may hold the port for another moment.
        let free = async || Echo::on(&node.ns, ([0, 0, 0, 0], port).into());
        let taken = running.check(eventually(Duration::from_secs(10), "somebody takes the port", free).await);
        running.agent("x-a").restart().expect("the agent starts");
        let what = format!("UDP {port} is named");
        running.says(&what, |status, message| status == "False" && message.contains(&port.to_string()) && message.contains(word)).await;
        drop(taken);
        running.says("all is well again", |status, _| status == "True").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_cannot_work_here_says_what_it_lacks_and_ends() {
    if !privileged("an_agent_that_cannot_work_here_says_what_it_lacks_and_ends") {
        return;
    }
    let lab = Lab::builder().without_kubernetes().up().await.expect("the lab starts");
    let agent = binary("raven-agent").expect("the agent is built");
    let agent = agent.to_string_lossy();
    let said = |script: &str| {
        let done = lab.node("x-a").ns.command("sh").args(["-c", script]).output().expect("sh starts");
        assert!(!done.status.success(), "{script} ends with an error");
        String::from_utf8_lossy(&done.stderr).into_owned()
    };
    // Not root's all: what a container has whose manifest forgot a capability.
    let without = said(&format!("exec setpriv --bounding-set=-sys_admin,-bpf --inh-caps=-all {agent} --node-name x-a --offline"));
    assert!(without.contains("CAP_BPF"), "{without}");
    let no_bpffs = said(&format!("mount -t tmpfs none /sys/fs/bpf; exec {agent} --node-name x-a --offline"));
    assert!(no_bpffs.contains("is no BPF file system") && no_bpffs.contains("mount -t bpf"), "{no_bpffs}");
    let nameless = said(&format!("exec env -u NODE_NAME {agent} --offline"));
    assert!(nameless.contains("--node-name"), "{nameless}");
}
