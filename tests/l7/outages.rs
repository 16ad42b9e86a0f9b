//! Links that break and agents that die: new requests work again at once. The kubelet is an HTTP server on its read-only port.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use raven_tests::{Lab, eventually, privileged, process::Process};

use crate::{Running, SOON};

impl Running {
    /// An HTTP server on a node's port 10255.
    fn serve(&self, node: &str) -> Result<Process> {
        let node = self.lab.node(node);
        std::fs::create_dir_all(node.dir.join("www"))?;
        std::fs::write(node.dir.join("www/metrics"), format!("of {}\n", node.name))?;
        let mut command = node.ns.command("busybox");
        command.args(["httpd", "-f", "-p", "10255", "-h"]).arg(node.dir.join("www"));
        Process::start(format!("httpd-{}", node.name), &self.lab.logs(), command)
    }

    /// One request by name, to the gateway node itself.
    fn ask(&self, from: &str, node: &str, seconds: u32) -> Result<String> {
        self.lab.node(from).ns.sh(&format!("curl -sS -m {seconds} -H 'Host: {node}:10255' http://10.0.0.11:10264/metrics"))
    }

    /// One request by address.
    fn ask_address(&self, from: &str, address: &str) -> Result<String> {
        self.lab.node(from).ns.sh(&format!("curl -sS -m 10 http://{address}:10255/metrics"))
    }

    async fn answered(&self, node: &str) -> Result<Duration> {
        let begin = Instant::now();
        let what = format!("a request for {node} is answered");
        eventually(SOON, &what, || async {
            let text = self.ask("cloud-b", node, 5)?;
            ensure!(text == format!("of {node}\n"), "it says {text:?}");
            Ok(())
        })
        .await?;
        Ok(begin.elapsed())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_work_again_when_the_link_and_the_agents_are_back() {
    if !privileged("requests_work_again_when_the_link_and_the_agents_are_back") {
        return;
    }
    let mut running = Running::of(Lab::builder()).await.expect("the lab starts");
    let _servers = ["x-b", "y-b"].map(|node| running.check(running.serve(node)));
    for node in ["x-b", "y-b"] {
        running.check(running.answered(node).await);
    }
    // Its own pool's nodes are reached directly, and both ways by address, from both kinds of cloud nodes.
    let _own = running.check(running.serve("cloud-b"));
    assert_eq!(running.check(running.ask("cloud-a", "cloud-b", 5)), "of cloud-b\n");
    for from in ["cloud-a", "cloud-b"] {
        assert_eq!(running.check(running.ask_address(from, "10.1.0.12")), "of x-b\n", "by address, from {from}");
    }
    let pod = running.lab.pod("cloud-a").ns.sh("curl -sS -m 10 http://10.2.0.12:10255/metrics");
    assert_eq!(running.check(pod), "of y-b\n", "by address, from a pod of the gateway node");

    // The link is cut for 30 s; the other site is not touched by it.
    let router = running.lab.pool("edge-x").router.clone();
    running.check(router.sh("ip link set wan down"));
    let end = tokio::time::Instant::now() + Duration::from_secs(30);
    running.check(running.answered("y-b").await);
    let refused = running.ask("cloud-b", "x-b", 20).expect("an answer, no hang");
    assert!(refused.contains("no tunnel to Gateway edge-x"), "{refused}");
    tokio::time::sleep_until(end).await;
    running.check(router.sh("ip link set wan up; ip route replace default via 198.51.100.1 dev wan"));
    let after = running.check(running.answered("x-b").await);
    println!("new requests work {} ms after the link is back", after.as_millis());
    assert!(after < Duration::from_secs(3), "it took {after:?}");

    // The site's NAT forgets everything and gives out other ports.
    running.check(router.sh("conntrack -F 2>/dev/null"));
    let rebound = running.check(running.answered("x-b").await);
    println!("new requests work {} ms after the NAT has forgotten", rebound.as_millis());

    // Agents die, on both sides, without a word.
    for node in ["x-a", "cloud-a"] {
        running.agent(node).kill().expect("the agent dies");
        if node == "cloud-a" {
            // Never by whatever the gateway node itself has on that port.
            let _own = running.check(running.serve("cloud-a"));
            let unanswered = running.lab.node("cloud-a").ns.sh("curl -sS -m 3 http://10.1.0.12:10255/metrics");
            assert!(unanswered.is_err(), "{unanswered:?}");
        }
        running.agent(node).restart().expect("the agent starts again");
        let again = running.check(running.answered("x-b").await);
        println!("new requests work {} ms after the agent of {node} was started again", again.as_millis());
    }
    assert_eq!(running.check(running.ask_address("cloud-b", "10.1.0.12")), "of x-b\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_two_sites_have_is_refused_and_the_names_work() {
    if !privileged("an_address_that_two_sites_have_is_refused_and_the_names_work") {
        return;
    }
    // Both sites are clones of one image: the same LAN, the same addresses.
    let mut pools = raven_tests::PoolSpec::three();
    pools[2].lan = Some(1);
    let running = Running::of(Lab::builder().pools(pools)).await.expect("the lab starts");
    let _servers = ["x-b", "y-b"].map(|node| running.check(running.serve(node)));
    for node in ["x-b", "y-b"] {
        running.check(running.answered(node).await);
    }
    let refused = running.ask_address("cloud-a", "10.1.0.12").expect_err("never guessed").to_string();
    assert!(!refused.contains("of x-b") && !refused.contains("of y-b"), "{refused}");
    let metrics = running.lab.node("cloud-a").ns.sh("curl -sS http://[::1]:10265/metrics").context("metrics");
    let metrics = running.check(metrics);
    assert!(metrics.contains("raven_proxy_refused_total{reason=\"Ambiguous\"} 1"), "{metrics}");
}
