"""Give README.md and pyproject.toml the addresses of a public repository, before a wheel is built.

python tools/addresses.py OWNER/NAME
A package index shows the README without the files beside it, so its pictures and links need whole
addresses. Which repository that is, only the workflow knows that builds the wheel there."""
import re, sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = r'(!?\[[^]]*\]\()(?!https?:|#)([^)]+)\)'


def absolute(text, repository):
    "Markdown `text` whose relative links lead to the files of the repository 'owner/name'."
    def whole(m):
        kind = 'raw' if m[1].startswith('!') else 'blob'
        return f'{m[1]}https://github.com/{repository}/{kind}/main/{m[2]})'
    return re.sub(LINK, whole, text)


def with_urls(project, repository):
    "The text of pyproject.toml with the addresses of code, issues and site."
    owner, name = repository.split('/')
    code = f'https://github.com/{repository}'
    urls = {'Repository': code, 'Issues': f'{code}/issues', 'Documentation':
            f'https://{owner}.github.io/{name}/'}
    lines = ['[project.urls]', *(f'{k} = "{v}"' for k, v in urls.items()), '', '[project.scripts]']
    return project.replace('[project.scripts]', '\n'.join(lines), 1)


if __name__ == '__main__':
    for name, change in {'README.md': absolute, 'pyproject.toml': with_urls}.items():
        text = (ROOT/name).read_text(encoding='utf-8')
        (ROOT/name).write_text(change(text, sys.argv[1]), encoding='utf-8')
