//! What must never be shown, and what must stay readable.

use proptest::prelude::*;

use super::*;

#[track_caller]
fn check(input: &str, expect: &str) {
    let got = mask_text(input);
    assert_eq!(got, expect);
    assert_eq!(mask_text(&got), got, "masking twice is masking once");
}

#[test]
fn credentials_are_hidden() {
    check("Authorization: Bearer abc.def-123", "Authorization: Bearer ***");
    check("authorization: Basic dXNlcjpwYXNz", "authorization: Basic ***");
    check("curl -H 'Authorization: token x1'", "curl -H 'Authorization: token ***'");
    check("got bearer abcdefgh12345678", "got bearer ***");
    check("Proxy-Authorization: Basic YTpi", "Proxy-Authorization: Basic ***");
    check("sent basic dXNlcjpwYXNz to it", "sent basic *** to it");
    check("Cookie: session=abc; theme=dark", "Cookie: ***");
    check("https://user:p%40ss@host/x.git", "https://***@host/x.git");
    check("https://user:p@ss@host/x.git", "https://***@host/x.git");
    check("from https://ghtoken@host and ssh://git@h:22/x", "from https://***@host and ssh://***@h:22/x");
    check("ghp_0123456789abcdefghijABCDEFGHIJ012345", "***");
    for kind in ["gho_", "ghs_", "ghu_", "ghr_", "github_pat_", "glpat-", "npm_", "xoxb-", "AKIA"] {
        check(
            &format!("x {kind}ABCDEFGHIJ0123456789AB y").replace("AKIAABCDEFGHIJ0123456789AB", "AKIAABCDEFGHIJ012345"),
            "x *** y",
        );
    }
    check("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln", "***");
    check(
        "https://x.blob.core.windows.net/c?sv=2024&sig=a%2Fb%3D&se=1",
        "https://x.blob.core.windows.net/c?sv=2024&sig=***&se=1",
    );
    check("PASSWORD=hunter2 next", "PASSWORD=*** next");
    check("db_password = 'hun ter2'", "db_password = '***'");
    check(r#"{"password":"a\"b","user":"x"}"#, r#"{"password":"***","user":"x"}"#);
    check(r#"{"client_secret" : "s", "n": 1}"#, r#"{"client_secret" : "***", "n": 1}"#);
    check("AWS_SECRET_ACCESS_KEY=abc/def+x", "AWS_SECRET_ACCESS_KEY=***");
    check("password: hunter2", "password: ***");
    check("X-Exec-Token: abcdef0123456789", "X-Exec-Token: ***");
    check("https://h/?access_token=abc&x=1", "https://h/?access_token=***&x=1");
    check("login --password hunter2 --user x", "login --password *** --user x");
    check("login --password=hunter2", "login --password=***");
    check("curl -u me:secretly https://h", "curl -u me:*** https://h");
    check("AccountName=a;AccountKey=abc==;Endpoint=x", "AccountName=a;AccountKey=***");
    check(
        "a\n-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabcd\n-----END RSA PRIVATE KEY-----\nb",
        "a\n***\n***\n***\n***\nb",
    );
}

#[test]
fn ordinary_text_stays() {
    for text in [
        "Step 3/7 : RUN cargo build --release",
        "error: unexpected token: fn",
        "error[E0433]: failed to resolve: use of undeclared type `Token::new`",
        "basic authentication is not supported",
        "https://github.com/a/b.git at v1.2.3",
        "docker build -t app:v1 --file Dockerfile .",
        "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "naïve café 日本語 \u{1f6a2}",
        "\u{1b}[1;32mok\u{1b}[0m\ttab",
        "mail to a@b.c",
        "",
    ] {
        check(text, text);
    }
}

#[test]
fn what_a_terminal_obeys_is_made_visible() {
    check("10%\r20%", "10%␍20%");
    check("a\u{1b}]0;title\u{7}b", "a␛]0;title␇b");
    check("a\u{1b}[2Jb\u{1b}[31mc", "a␛[2Jb\u{1b}[31mc");
    check("a\u{202e}b\u{2066}c\u{feff}", "a\\u{202e}b\\u{2066}c\\u{feff}");
    check("a\u{9b}31mb\u{7f}\0", "a\\u{9b}31mb␡␀");
    check("dos\r\nunix\n", "dos\nunix\n");
    let mut masker = Masker::new(&[]);
    assert_eq!(masker.push(b"a\xff\xc3b\xe2\x82\n"), b"a\\xff\\xc3b\\xe2\\x82\n");
}

#[test]
fn long_lines_are_cut_and_say_so() {
    let mut masker = Masker::new(&[]);
    let mut out = Vec::new();
    for _ in 0..40 {
        out.extend(masker.push(&[b'x'; 10_000]));
    }
    out.extend(masker.push(b"\nshort\n"));
    let text = String::from_utf8(out).expect("utf-8");
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0].len(), LINE_MAX + CUT.len());
    assert!(lines[0].ends_with(CUT));
    assert_eq!(lines[1], "short");
}

#[test]
fn a_sentence_is_one_line_without_colours() {
    for (said, expect) in [
        ("a\r\nb \u{1b}[31mred\u{1b}[0m\tc", "a b red c"),
        ("x\u{1b}]0;title\u{7}y\u{1b}[2J", "x␛]0;title␇y␛[2J"),
        ("v1\u{202e}.0\u{200b}\u{e0041}", "v1\\u{202e}.0\\u{200b}\\u{e0041}"),
        ("Endpoint=sb://x/;AccountKey=abc==", "Endpoint=sb://x/;AccountKey=***"),
        (
            "remote: no access for https://bob:hunter2@git.test/x.git",
            "remote: no access for https://***@git.test/x.git",
        ),
        ("it failed; look at the log", "it failed; look at the log"),
    ] {
        assert_eq!(mask_sentence(said, usize::MAX), expect, "{said:?}");
    }
    let masker = Masker::new(&["correct-horse".to_owned()]);
    assert_eq!(mask_sentence_with(&masker, "it is correct-\nhorse"), "it is *** ***");
}

fn masked(secrets: &[&str], chunks: &[&[u8]]) -> String {
    let mut masker = Masker::new(&secrets.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>());
    let mut out: Vec<u8> = chunks.iter().flat_map(|chunk| masker.push(chunk)).collect();
    out.extend(masker.finish());
    String::from_utf8(out).expect("utf-8")
}

#[test]
fn known_values_are_hidden_over_chunks_lines_and_encodings() {
    #[track_caller]
    fn check(chunks: &[&[u8]], expect: &str) {
        assert_eq!(masked(&["correct-horse-battery", "other99"], chunks), expect);
    }
    check(&[b"a correct-horse-battery b"], "a *** b\n");
    check(&[b"a correct-h", b"orse-batt", b"ery b\n"], "a *** b\n");
    check(&[b"a correct-hor\nse-battery b\n"], "a ***\n*** b\n");
    check(&[b"a correct-hor\r\nse-battery b\n"], "a ***\n*** b\n");
    check(&[b"correct-correct-horse-batteryother99\n"], "correct-***\n");
    check(&[b"a correct-horse b\n"], "a correct-horse b\n");
    check(&[b"Y29ycmVjdC1ob3JzZS1iYXR0ZXJ5\n"], "***\n");
    // base64 of "user:correct-horse-battery", also wrapped.
    check(&[b"dXNlcjpjb3JyZWN0LWhvcnNlLWJhdHRlcnk=\n"], "dXNlcjp***=\n");
    check(&[b"dXNlcjpjb3JyZWN0LWhv\ncnNlLWJhdHRlcnk=\n"], "dXNlcjp***\n***=\n");
    assert_eq!(masked(&["p&ss w0rd"], &[b"x=p%26ss%20w0rd y\n"]), "x=*** y\n");
    assert_eq!(masked(&["a\nlong\nkey"], &[b"1 a\nlong\nkey 2\n"]), "1 ***\n***\n*** 2\n");
    assert_eq!(masked(&["abc"], &[b"abc\n"]), "abc\n", "too short to be searched for");
}

#[test]
fn a_silent_stream_gives_its_complete_lines() {
    let mut masker = Masker::new(&["secret-value-1".to_owned()]);
    let mut out = masker.push(b"step s\npart");
    assert_eq!(out, b"step s\n".to_vec(), "no value goes on with 'part'");
    out = masker.push(b"ial\nit is s\n");
    assert_eq!(out, b"partial\n", "the last line might go on");
    masker.idle(&mut out);
    assert_eq!(out, b"partial\nit is s\n");
    out = masker.push(b"x secret-va\n");
    assert!(out.is_empty());
    masker.idle(&mut out);
    assert_eq!(out, b"x ***\n", "a long beginning is hidden");
    out = masker.push(b"lue-1 y\n");
    assert_eq!(out, b"*** y\n", "and so is the rest");
}

#[test]
fn a_flood_takes_linear_time() {
    // Each of these is a worst case of a backtracking matcher; together they take well under a second here.
    for piece in ["password", "a://b@", "eyJ", "--token ", "\u{1b}[", "correct-", "token:'", "\\\"token\\\":"] {
        let text = piece.repeat(2_000_000 / piece.len());
        let _ = masked(&["correct-correct-horse"], &[text.as_bytes()]);
    }
}

fn has_forbidden(text: &str) -> bool {
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if let Some(sgr) = sgr(rest) {
            rest = &rest[sgr.len()..];
            continue;
        }
        if (c.is_control() && c != '\n' && c != '\t') || is_obeyed(c) {
            return true;
        }
        rest = &rest[c.len_utf8()..];
    }
    false
}

fn in_chunks(masker: &mut Masker, bytes: &[u8], cuts: &[usize]) -> Vec<u8> {
    let (mut out, mut rest) = (Vec::new(), bytes);
    for cut in cuts {
        let (now, later) = rest.split_at(cut % (rest.len() + 1));
        out.extend(masker.push(now));
        rest = later;
    }
    out.extend(masker.push(rest));
    out.extend(masker.finish());
    out
}

proptest! {
    #[test]
    fn any_bytes_give_safe_text_whatever_the_chunks(
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(b'\n'), Just(0x1b), Just(b'[')], 0..400),
        cuts in prop::collection::vec(0usize..60, 0..12),
        secret in "[a-z]{4,8}",
    ) {
        let secrets = [secret];
        let out = in_chunks(&mut Masker::new(&secrets), &bytes, &cuts);
        let text = String::from_utf8(out.clone()).expect("utf-8");
        prop_assert!(!has_forbidden(&text), "{text:?}");
        prop_assert_eq!(&out, &in_chunks(&mut Masker::new(&secrets), &bytes, &[]));
    }

    #[test]
    fn a_known_value_never_appears(
        secret in "[A-Za-z0-9+/_-]{6,40}",
        other in "[A-Za-z0-9]{4,10}",
        before in "[ -~\n]{0,60}",
        after in "[ -~\n]{0,60}",
        wrap in prop::collection::vec(1usize..40, 0..3),
        cuts in prop::collection::vec(0usize..60, 0..12),
    ) {
        let mut wrapped = secret.clone();
        for at in &wrap {
            wrapped.insert(at % wrapped.len(), '\n');
        }
        let text = format!("{before}{secret}{after}\n{before}{wrapped}{after}\n");
        let out = in_chunks(&mut Masker::new(&[secret.clone(), other.clone()]), text.as_bytes(), &cuts);
        let text = String::from_utf8(out).expect("utf-8");
        let flat = text.replace('\n', "");
        prop_assert!(!flat.contains(&secret), "{secret:?} in {text:?}");
        prop_assert!(!flat.contains(&other), "{other:?} in {text:?}");
    }

    #[test]
    fn plain_text_is_masked_once(text in "[ -~]{0,200}") {
        let once = mask_text(&text);
        prop_assert_eq!(mask_text(&once), once);
    }
}
