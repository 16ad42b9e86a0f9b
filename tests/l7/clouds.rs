//! Two clouds, each with an exposed Gateway, without a network between their nodes.

use anyhow::{Result, ensure};
use raven_tests::{Lab, Namespace, PoolSpec, Protocol, eventually, require_root};

use crate::{Running, SOON};

#[tokio::test(flavor = "multi_thread")]
async fn requests_to_the_proxy_of_another_cloud_are_answered_by_the_own_one() {
    require_root!();
    let mut pools = PoolSpec::three();
    let mut second = PoolSpec::new("cloud-2", "d", 3, 40);
    second.forwards = vec![second.forward(Protocol::Udp, 4500, 0), second.forward(Protocol::Tcp, 10262, 0)];
    pools.push(second);
    let running = Running::of(Lab::builder().pools(pools)).await.expect("start the lab");
    let lab = &running.lab;
    running.check(running.serve("x-b").await);
    // The Service of the proxies has the addresses of both clouds, and kube-proxy chooses any.
    let (first, second) = ("10.0.0.11", "10.3.0.11");
    let clients: [(&Namespace, &str); 6] = [
        (&lab.node("cloud-a").ns, second),
        (&lab.node("cloud-b").ns, second),
        (&lab.pod("cloud-b").ns, second),
        (&lab.node("d-a").ns, first),
        (&lab.node("d-b").ns, first),
        (&lab.pod("d-a").ns, first),
    ];
    for (client, proxy) in clients {
        running.check(answers(client, proxy).await);
    }
    // Other ports of that node are not affected; its kubelet may be reachable, and must not be mistaken for another one.
    for node in ["cloud-a", "cloud-b"] {
        let device = |port: u16| -> Result<String> {
            let route = lab.node(node).ns.sh(&format!("ip route get {second} ipproto tcp dport {port}"))?;
            Ok(route.lines().next().unwrap_or_default().to_owned())
        };
        for port in [10250, 10255, 4500] {
            let route = running.check(device(port));
            assert!(route.contains("dev eth0"), "{node}, port {port}: {route}");
        }
        let route = running.check(device(10264));
        assert!(route.contains("table 9030"), "{node}, port 10264: {route}");
    }
    // L3 carries node addresses, too.
    running.check(lab.cluster().put_setting("raven-agent-config", "forward-node-ip", "true").await);
    let routed = || async {
        let route = lab.node("cloud-a").ns.sh(&format!("ip route get {second}"))?;
        ensure!(route.contains("dev raven-wg0"), "{route}");
        Ok(())
    };
    running.check(eventually(SOON, "L3 carries the addresses of nodes", routed).await);
    for (client, proxy) in clients {
        running.check(answers(client, proxy).await);
    }
}

/// Waits until a request by name that `client` sends to `proxy` is answered by x-b, and one for an unknown name refused.
async fn answers(client: &Namespace, proxy: &str) -> Result<()> {
    let answered = || async {
        let text = client.sh(&format!("curl -sS -m 5 -H 'Host: x-b:10255' http://{proxy}:10264/metrics"))?;
        ensure!(text == "of x-b\n", "unexpected answer {text:?}");
        // The TLS listener: an alert names what is wrong.
        let url = format!("--resolve stranger:10263:{proxy} https://stranger:10263/");
        let text = client.sh(&format!("curl -skS -m 5 {url} 2>&1 || true"))?;
        ensure!(text.contains("unrecognized name"), "unexpected answer {text:?}");
        Ok(())
    };
    eventually(SOON, &format!("{} is answered at {proxy}", client.name), answered).await
}
