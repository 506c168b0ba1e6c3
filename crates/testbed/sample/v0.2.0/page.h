/* What the page looks like. */
#define PAGE_TITLE "A plank of teak, freshly oiled"
#define PAGE_BACKGROUND "#12343b"
#define PAGE_COLOUR "#f6e7d8"
