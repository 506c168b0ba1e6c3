//! Which health checks ask what a probe can ask: an HTTP request, or a connection, to the container itself.

/// What a check does, as far as it is understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    Http {
        port: u16,
        path: String,
    },
    Tcp {
        port: u16,
    },
    /// `NONE`, or switched off.
    Off,
    /// The command, for a person to read.
    Other(String),
}

/// A check of plain words, run without a shell.
pub fn of_words(words: &[String]) -> Check {
    let shown = || Check::Other(words.join(" "));
    let mut arguments = words.iter().map(String::as_str);
    let program = arguments.next().map(|p| p.rsplit('/').next().unwrap_or(p));
    match program {
        Some("curl" | "wget") => {
            let targets: Vec<&str> = arguments.filter(|a| a.contains("://") || a.starts_with("localhost")).collect();
            // A request that carries more than its address asks something that a probe would not.
            let plain = !words.iter().any(|w| changes_the_request(w));
            match targets.as_slice() {
                [url] if plain => own(url).unwrap_or_else(shown),
                _ => shown(),
            }
        }
        Some("nc") => {
            let rest: Vec<&str> = arguments.filter(|a| !a.starts_with('-')).collect();
            match rest.as_slice() {
                [host, port] if is_self(host) && words.iter().any(|w| w.starts_with('-') && w.contains('z')) => {
                    port.parse().map_or_else(|_| shown(), |port| Check::Tcp { port })
                }
                _ => shown(),
            }
        }
        Some(_) | None => shown(),
    }
}

/// A check that a shell runs. Only a plain command is understood, with the usual `|| exit 1` behind it.
pub fn of_shell(command: &str) -> Check {
    let shown = || Check::Other(command.split_whitespace().collect::<Vec<_>>().join(" "));
    let (first, then) = command.split_once("||").unwrap_or((command, ""));
    let is_usual = matches!(then.trim(), "" | "exit 1" | "false" | "(exit 1)");
    let first = first.trim();
    let first = ["> /dev/null 2>&1", ">/dev/null 2>&1", "> /dev/null", ">/dev/null"]
        .iter()
        .find_map(|end| first.strip_suffix(end))
        .unwrap_or(first);
    if !is_usual || first.contains(['|', '&', ';', '`', '$', '>', '<', '(', '\n']) {
        return shown();
    }
    match shlex::split(first).map(|words| of_words(&words)) {
        Some(Check::Other(_)) | None => shown(),
        Some(check @ (Check::Http { .. } | Check::Tcp { .. } | Check::Off)) => check,
    }
}

fn changes_the_request(word: &str) -> bool {
    const LONG: [&str; 9] =
        ["--request", "--data", "--header", "--user", "--post", "--method", "--insecure", "--unix-socket", "--resolve"];
    let short = word.starts_with('-') && !word.starts_with("--") && word.contains(['X', 'd', 'H', 'u', 'k']);
    short || LONG.iter().any(|l| word.starts_with(l))
}

fn is_self(host: &str) -> bool {
    matches!(host, "localhost" | "127.0.0.1" | "0.0.0.0" | "[::1]")
}

/// A request to the container itself over plain HTTP.
fn own(url: &str) -> Option<Check> {
    let rest = match url.split_once("://") {
        Some(("http", rest)) => rest,
        Some(_) => return None,
        None => url,
    };
    let (authority, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port.parse().ok()?),
        Some(_) | None => (authority, 80),
    };
    let fine = is_self(host) && !path.contains('#') && path.len() <= 256 && path.bytes().all(|b| b.is_ascii_graphic());
    (fine && port != 0).then(|| Check::Http { port, path: path.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_understood_or_shown() {
        let http = |port, path: &str| Check::Http { port, path: path.to_owned() };
        let other = |text: &str| Check::Other(text.to_owned());
        for (command, expect) in [
            ("curl -fsS http://localhost:8080/healthz || exit 1", http(8080, "/healthz")),
            ("wget --spider -q http://127.0.0.1/up?x=1 > /dev/null", http(80, "/up?x=1")),
            ("/usr/bin/curl -f http://[::1]:80", http(80, "/")),
            ("nc -z localhost 5432", Check::Tcp { port: 5432 }),
            ("curl -f https://localhost/", other("curl -f https://localhost/")),
            ("curl -f http://db:80/", other("curl -f http://db:80/")),
            ("curl -X POST http://localhost/", other("curl -X POST http://localhost/")),
            ("curl -f http://localhost/ | grep ok", other("curl -f http://localhost/ | grep ok")),
            ("curl http://localhost/ && rm -rf /", other("curl http://localhost/ && rm -rf /")),
            ("pg_isready  -U x", other("pg_isready -U x")),
        ] {
            assert_eq!(of_shell(command), expect, "{command}");
        }
    }
}
